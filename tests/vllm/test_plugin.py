"""How the plugin puts itself into vLLM."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayft.errors import ResourceError
from rayft.serving.engine.vllm.plugin import ANSWERS, ERROR_FILE, register
from tests.vllm.layers import configuration, new_model, new_weights, worker

mixin = pytest.importorskip("vllm.v1.worker.lora_model_runner_mixin")


class Stock:
    """In place of vLLM's own manager."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def create_lora_manager(self, model: Any, _: Any) -> Any:
        return model


@pytest.fixture(autouse=True)
def _stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mixin, "LRUCacheWorkerLoRAManager", Stock)
    monkeypatch.setattr(mixin, "supports_lora", lambda _: True)
    monkeypatch.setattr("vllm.__version__", "0.26.0")
    before = [*logging.getLogger("vllm").handlers]
    yield
    logging.getLogger("vllm").handlers[:] = before


def load_model(config: Any) -> Any:
    """Let vLLM's runner load a model; return the manager that it made."""
    model: Any = new_model(new_weights())
    model.embedding_modules = {}
    runner = mixin.LoRAModelRunnerMixin()
    assert runner.load_lora_model(model, config, torch.device("cpu")) is model
    return runner.lora_manager


def asked(**options: Any) -> Any:
    config = configuration()
    config.additional_config["rayft"] |= options
    return config


def test_an_engine_that_asks_for_it_has_rayfts_manager() -> None:
    register()
    manager = load_model(asked())
    assert isinstance(manager, worker.WorkerManager)
    assert manager.list_adapters() == set()


@pytest.mark.parametrize("config", [None, {}, {"other": {}}], ids=str)
def test_another_engine_keeps_vllms(config: dict[str, Any] | None) -> None:
    register()
    wanted = SimpleNamespace(additional_config=config)
    manager = load_model(wanted)
    assert isinstance(manager, Stock)
    assert manager.arguments == (wanted, torch.device("cpu"), {})


def test_it_is_registered_once() -> None:
    register()
    made, handlers = mixin.LRUCacheWorkerLoRAManager, [*logging.getLogger("vllm").handlers]
    register()
    assert mixin.LRUCacheWorkerLoRAManager is made
    assert logging.getLogger("vllm").handlers == handlers


@pytest.mark.parametrize(
    ("version", "options", "message"),
    [
        ("0.25.1", {}, "not supported"),
        ("0.33.0", {"untested": True}, "not supported"),
        ("0.31.0", {}, "vllm_untested"),
        ("0.31.0", {"untested": True}, None),
    ],
)
def test_a_release_that_may_be_wrong_is_refused(
    version: str, options: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    monkeypatch.setattr("vllm.__version__", version)
    assert isinstance(load_model(SimpleNamespace(additional_config=None)), Stock)
    if message is None:
        assert isinstance(load_model(asked(**options)), worker.WorkerManager)
    else:
        with pytest.raises(ResourceError, match=message):
            load_model(asked(**options))


def fail(reason: str) -> None:
    """Log an exception, as vLLM's processes do that fail to start."""
    logging.getLogger("vllm.v1.engine.core").error("EngineCore failed.", exc_info=ValueError(reason))


def test_the_reason_of_a_failed_start_is_left_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    fail("nobody waits for it")
    monkeypatch.setenv(ANSWERS, str(tmp_path))
    logging.getLogger("vllm").error("no exception")
    assert [*tmp_path.iterdir()] == []
    for reason in ("first", "no memory: 3 > 2 ×"):
        fail(reason)
    assert (tmp_path / ERROR_FILE).read_text(encoding="utf-8") == "ValueError: no memory: 3 > 2 ×"
    monkeypatch.setenv(ANSWERS, str(tmp_path / "deleted"))
    fail("too late")
    assert [path.name for path in tmp_path.iterdir()] == [ERROR_FILE]

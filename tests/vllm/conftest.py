"""vLLM's configuration and the place of a worker among others, which its layers read when they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest


@pytest.fixture(autouse=True)
def _configured() -> Iterator[None]:
    vllm = pytest.importorskip("vllm.config")
    with vllm.set_current_vllm_config(vllm.VllmConfig(device_config=vllm.DeviceConfig(device="cpu"))):
        yield


@pytest.fixture(autouse=True)
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let layers that are made from now on be those of one worker of several; of one alone to begin with."""

    def become(rank: int, workers: int) -> None:
        for module in ("vllm.model_executor.layers.linear", "vllm.model_executor.parameter"):
            for name, value in (("rank", rank), ("world_size", workers)):
                monkeypatch.setattr(
                    f"{module}.get_tensor_model_parallel_{name}", lambda value=value: value, raising=False
                )

    become(0, 1)
    return become

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedModel

from rayft.config import parse
from rayft.errors import ConfigError
from rayft.kernels.grouped_lora import WIDEST
from rayft.models.fingerprint import source_fingerprint
from rayft.models.load import ModelConfig, load_skeleton
from rayft.serving.config import ServeConfig
from rayft.serving.engine import start
from rayft.serving.engine.api import EngineLimits
from rayft.serving.engine.start import _served, check_engine, describe, start_engine


@pytest.mark.parametrize(
    "options", [{"gpus": 2}, {"gpu_memory": 0.5}, {"fp8": True}, {"vllm_untested": True}], ids=str
)
def test_settings_of_vllm_are_refused_on_a_cpu(options: dict[str, Any]) -> None:
    config = parse(ServeConfig, {"engine": "cpu", **options})
    (name,) = options
    # A replica starts an engine without the checks that precede `rayft serve`.
    for refuse in (check_engine, start_engine):
        with pytest.raises(ConfigError, match=f"^{name} is a setting of vLLM, .* leave it out on a CPU"):
            refuse(config, "cpu")


def test_the_defaults_of_vllms_settings_are_no_settings() -> None:
    named = {name: ServeConfig.model_fields[name].default for name in ("gpus", "gpu_memory", "fp8")}
    check_engine(parse(ServeConfig, named), "cpu")


def test_on_a_cpu_no_sequence_is_so_long_that_it_changes_the_rotations_of_others(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    half = settings["hidden_size"] // settings["num_attention_heads"] // 2
    settings["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 48,
        "factor": settings["max_position_embeddings"] / 48,
        "short_factor": [1.0] * half, "long_factor": [4.0] * half,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    started = start_engine(ServeConfig(model=ModelConfig(name=str(folder)), dtype="float32"), "cpu")
    started.engine.stop()
    assert started.context == 48 < settings["max_position_embeddings"]


@pytest.mark.parametrize("engine", ["cpu", "vllm"])
def test_only_language_models_are_served(engine: Any) -> None:
    config = parse(ServeConfig, {"model": {"task": "sequence_classification"}})
    with pytest.raises(ConfigError, match=r"model\.task: sequence_classification is not served"):
        check_engine(config, engine)


def test_a_replica_on_gpus_leaves_the_base_to_vllm(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayft.serving.engine.vllm import engine as engines

    def load(*_: object, **__: object) -> None:
        pytest.fail("the base is loaded twice")

    made = []

    def engine(options: engines.VllmOptions, limits: EngineLimits, ends: list[int]) -> Any:
        made.append((options, limits))
        return SimpleNamespace(linears={}, context=48)

    config = ServeConfig(model=ModelConfig(name=str(tiny_folder)), fp8=True, device_bytes="1MB")
    skeleton = load_skeleton(config.model)
    monkeypatch.setattr(start, "load_model", load)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)
    monkeypatch.setattr(engines, "installed", lambda: "0.26.0")
    monkeypatch.setattr(engines, "VllmEngine", engine)
    started = start_engine(config, "vllm")
    ((options, limits),) = made
    assert (options.model, options.adapter_bytes, options.fp8) == (str(tiny_folder), 10**6, True)
    assert limits == EngineLimits(config.max_running, 0, 0), "vLLM chooses the others"
    assert started.context == 48
    assert started.base.unserved == started.base.shapes.keys(), "the engine has no linear layer"
    assert started.base.fingerprint == source_fingerprint(skeleton, str(tiny_folder))


@pytest.mark.parametrize("setting", ["pipeline_parallel", "pipeline_parallel_size", "speculative_config"])
def test_pipelines_and_speculation_are_refused_by_name(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{setting}'"):
        parse(ServeConfig, {setting: 2})


def test_vllm_serves_ranks_up_to_the_kernels_widest(tiny_folder: Path) -> None:
    config = ServeConfig(model=ModelConfig(name=str(tiny_folder)))
    assert describe(config, "vllm").widest == WIDEST
    assert describe(config, "cpu").widest is None


def test_layers_that_vllm_lacks_or_has_in_another_shape_can_not_have_adapters(tiny_folder: Path) -> None:
    base = describe(ServeConfig(model=ModelConfig(name=str(tiny_folder))), "vllm")
    first, second, *_ = base.shapes
    experts = replace(base, shapes={**base.shapes, "model.layers.0.mlp.experts.0.w1": (4, 8)})
    linears = {**base.shapes, second: (base.shapes[second][0] + 1, base.shapes[second][1])}
    assert _served(base, base.shapes).unserved == frozenset()
    assert _served(experts, linears).unserved == {"model.layers.0.mlp.experts.0.w1", second}
    del linears[first]
    assert first in _served(experts, linears).unserved

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayft.config import parse
from rayft.errors import ConfigError
from rayft.kernels.grouped_lora import WIDEST
from rayft.models.load import ModelConfig
from rayft.serving.config import ServeConfig
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


@pytest.mark.parametrize("engine", ["cpu", "vllm"])
def test_only_language_models_are_served(engine: Any) -> None:
    config = parse(ServeConfig, {"model": {"task": "sequence_classification"}})
    with pytest.raises(ConfigError, match=r"model\.task: sequence_classification is not served"):
        check_engine(config, engine)


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

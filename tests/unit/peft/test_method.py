"""Names and settings of PEFT's methods: which fields the settings fill, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rayft.errors import MethodError
from rayft.methods import METHODS
from rayft.methods.base import ChainConfig, MethodConfig
from rayft.models.methods import method, settled
from rayft.peft.method import PeftMethod
from rayft.sweep.space import MethodSpace, SweepConfig, points
from rayft.train.run import RunConfig

SHAPES = {"layers.0.q_proj": (32, 32), "layers.0.k_proj": (16, 32), "layers.0.up_proj": (64, 32)}


def fields(config: MethodConfig, seed: int = 0) -> Any:
    kind = method(config.name)
    assert isinstance(kind, PeftMethod)
    return kind.peft_config(config, SHAPES, seed, transposed=False)


@pytest.mark.parametrize(
    ("given", "name", "config_class"),
    [
        ("peft:DoRA", "peft:DoRA", "LoraConfig"),
        ("peft:pissa", "peft:PiSSA", "LoraConfig"),
        ("peft:Loha", "peft:LoHa", "LoHaConfig"),
        ("peft:RandLoraConfig", "peft:RandLoRA", "RandLoraConfig"),
        ("peft:VERA", "peft:VeRA", "VeraConfig"),
        ("peft:miss", "peft:MiSS", "MissConfig"),
    ],
)
def test_a_name_means_a_class_of_peft(given: str, name: str, config_class: str) -> None:
    kind = method(given)
    assert isinstance(kind, PeftMethod)
    assert (kind.name, kind.config_class) == (name, config_class)
    assert settled(MethodConfig(name=given)).name == name


def test_only_full_fine_tuning_leaves_a_whole_model_behind() -> None:
    assert [name for name, kind in METHODS.items() if kind.saves_model] == ["full"]
    assert not method("peft:DoRA").saves_model


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("peft:DoRAA", "did you mean 'peft:DoRA'"),
        ("peft:PromptTuning", "adapts no linear layers of the base"),
        ("peft:PrefixTuning", "adapts no linear layers of the base"),
        ("peft:XLora", "adapts no linear layers of the base"),
        ("peft:AdaLora", "prunes ranks in a hook after each step"),
        ("peft:LNTuning", "trains whole layers, meant for norms"),
        ("peft:Poly", "each example's task"),
    ],
)
def test_a_class_that_cannot_be_trained_is_refused_with_the_reason(name: str, match: str) -> None:
    with pytest.raises(MethodError, match=match):
        method(name)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"name": "peft:MiSS", "alpha": 4.0},
            "has no alpha in PEFT's MissConfig, .* so method.alpha does nothing: drop it",
        ),
        ({"name": "peft:C3A", "rank": 8}, "has no rank in PEFT's C3AConfig, .* so method.rank does nothing"),
        (
            {"name": "peft:C3A", "dropout": 0.1},
            "no field for it in PEFT's C3AConfig, so method.dropout does nothing",
        ),
        (
            {"name": "peft:VeRA", "rslora": True},
            "no field for it in PEFT's VeraConfig, so method.rslora does nothing",
        ),
        ({"name": "peft:VeRA", "rank_pattern": {"q_proj": 2}}, "so method.rank_pattern does nothing"),
        ({"name": "peft:VeRA", "options": {"d_inital": 1}}, "no option 'd_inital'; did you mean 'd_initial'"),
        ({"name": "peft:VeRA", "options": {"r": 8}}, "is set by method.rank"),
        ({"name": "peft:LoRA", "options": {"lora_alpha": 8}}, "is set by method.alpha"),
        ({"name": "peft:LoRA", "options": {"use_dora": True}}, "is set by method.name"),
        ({"name": "peft:LoRA", "options": {"lora_dropout": 0.1}}, "is set by method.dropout"),
        ({"name": "peft:LoRA", "options": {"target_modules": ["q"]}}, "method.targets: drop it"),
        ({"name": "peft:LoRA", "options": {"task_type": "CAUSAL_LM"}}, "follows from the model"),
        ({"name": "peft:LoRA", "options": {"bias": "all"}}, "follows from the model"),
        ({"name": "peft:LoRA", "options": {"init_lora_weights": "eva"}}, "can't start as 'eva'"),
        ({"name": "peft:LoRA", "options": {"lora_bias": True}}, "more than B·A"),
        ({"name": "peft:DoRA", "options": {"init_lora_weights": "pissa"}}, "can't start as 'pissa'"),
        (
            {"name": "peft:PiSSA", "options": {"init_lora_weights": "olora"}},
            "starts as pissa or pissa_niter_",
        ),
        ({"name": "peft:MiSS", "options": {"init_weights": "bat"}}, "can't start as 'bat'"),
        ({"name": "peft:AdaMSS", "options": {"use_asa": True}}, "a hook after each step"),
        ({"name": "peft:LoRA", "chain": ChainConfig()}, "is no chain"),
        ({"name": "peft:LoRA", "lr_ratio": 2.0}, "has one learning rate"),
        ({"name": "lora", "options": {"r": 3}}, "takes no options"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        settled(MethodConfig(**settings))


def test_settings_fill_the_class_own_fields() -> None:
    config = MethodConfig(name="peft:DoRA", rank=8, alpha=4.0, rslora=True, dropout=0.25)
    made = fields(config)
    assert (made.r, made.lora_alpha, made.use_rslora, made.lora_dropout) == (8, 4.0, True, 0.25)
    assert made.use_dora
    assert made.target_modules == set(SHAPES)
    assert fields(MethodConfig(name="peft:LoRA", rank=8)).lora_alpha == 16
    assert fields(MethodConfig(name="peft:RandLoRA", rank=8)).randlora_alpha == 160
    assert fields(MethodConfig(name="peft:VeRA", rank=64, dropout=0.1)).vera_dropout == 0.1
    assert fields(MethodConfig(name="peft:PiSSA", rank=2)).init_lora_weights == "pissa"


def test_a_rank_pattern_names_each_module_and_keeps_the_scale() -> None:
    made = fields(MethodConfig(name="peft:LoRA", rank=8, rank_pattern={"k_proj": 2}))
    assert made.rank_pattern == {
        r"^layers\.0\.q_proj$": 8,
        r"^layers\.0\.k_proj$": 2,
        r"^layers\.0\.up_proj$": 8,
    }
    assert {made.alpha_pattern[name] / rank for name, rank in made.rank_pattern.items()} == {2}


def test_block_sizes_follow_from_the_layers() -> None:
    assert fields(MethodConfig(name="peft:C3A")).block_size == 16
    assert fields(MethodConfig(name="peft:C3A", options={"block_size": 8})).block_size == 8
    assert fields(MethodConfig(name="peft:VBLoRA", rank=2)).vector_length == 16


def test_frozen_projections_follow_the_seed() -> None:
    config = MethodConfig(name="peft:VeRA")
    assert fields(config, seed=3).projection_prng_key != fields(config, seed=4).projection_prng_key
    fixed = MethodConfig(name="peft:VeRA", options={"projection_prng_key": 9})
    assert fields(fixed, seed=3).projection_prng_key == 9


def test_zero_3_is_refused() -> None:
    with pytest.raises(MethodError, match=r"ZeRO-3 partitions: use scale\.zero 0, 1 or 2"):
        method("peft:LoRA").check_base(partitioned=True)


def test_a_sweep_takes_methods_of_peft_beside_ours() -> None:
    run = RunConfig.model_validate({"data": {"name": "needle_haystack", "train": 8, "val": 2, "test": 2}})
    sweep = SweepConfig(
        methods={"lora": MethodSpace(ranks=(4,), lr=(1e-2,)), "peft:c3a": MethodSpace(lr=(1e-1,))}
    )
    assert [point.name for point in points(sweep, run)] == ["lora-r4-lr0.01-s0", "peft:C3A-lr0.1-s0"]
    with pytest.raises(ValidationError, match="did you mean 'peft:DoRA'"):
        SweepConfig(methods={"peft:DoR": MethodSpace()})


def test_methods_alone_need_no_transformers() -> None:
    code = "import sys, rayft.methods; print('peft' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "alpha", "expected"),
    [
        ("peft:LoRA", None, 16.0), ("peft:LoRA", 4.0, 4.0), ("peft:RandLoRA", None, 160.0),
        ("peft:PSOFT", None, 8.0), ("peft:VeRA", None, None), ("peft:MiSS", None, None), ("lora", None, 16.0),
        ("full", None, None),
    ],
)  # fmt: skip
def test_alpha_is_what_the_class_gets(name: str, alpha: float | None, expected: float | None) -> None:
    assert method(name).alpha(MethodConfig(name=name, rank=8, alpha=alpha)) == expected

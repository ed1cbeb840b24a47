"""The search space: every point is a complete, validated run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from rayft.config import parse
from rayft.data.source import DataConfig
from rayft.errors import ConfigError, MethodError
from rayft.methods.base import ChainConfig
from rayft.squeeze.anneal import AnnealConfig
from rayft.sweep.decisions import rungs
from rayft.sweep.space import (
    LogUniform,
    MethodSpace,
    SweepConfig,
    check_distinct,
    check_executor,
    check_slots,
    points,
)
from rayft.train.run import RunConfig, ScaleConfig


@pytest.fixture
def run() -> RunConfig:
    data = DataConfig(name="needle_haystack", train=8, val=2, test=2)
    return RunConfig(data=data, scale=ScaleConfig(device="cpu", dtype="float32", zero=0))


def test_a_grid_has_each_methods_own_learning_rates(run: RunConfig) -> None:
    sweep = SweepConfig(
        methods={
            "lora": MethodSpace(ranks=(4, 8), lr=(1e-3, 2e-3)),
            "cla": MethodSpace(ranks=(16,), lr=(1e-2,), alpha=16.0),
        },
        seeds=(0, 1),
    )
    found = points(sweep, run)
    assert len(found) == (2 * 2 + 1) * 2
    assert len({point.key for point in found}) == len(found)
    assert {(p.run.method.name, p.run.optim.lr) for p in found} == {
        ("lora", 1e-3),
        ("lora", 2e-3),
        ("cla", 1e-2),
    }
    assert {p.run.seed for p in found} == {0, 1}
    cla = next(p for p in found if p.run.method.name == "cla")
    assert cla.run.method.scale == 1.0
    assert cla.name == "cla-r16-lr0.01-s0"


def test_a_cap_treats_methods_alike_and_keys_are_stable(run: RunConfig) -> None:
    spaces = {"lora": MethodSpace(lr=(1e-3, 2e-3, 4e-3)), "cla": MethodSpace(lr=(1e-3, 2e-3, 4e-3))}
    every = points(SweepConfig(methods=spaces), run)
    some = points(SweepConfig(methods=spaces, trials=4), run)
    assert [p.run.method.name for p in some] == ["lora", "cla", "lora", "cla"]
    assert {p.key for p in some} < {p.key for p in every}
    with pytest.raises(ConfigError, match="there are 2 methods; allow at least one trial each"):
        points(SweepConfig(methods=spaces, trials=1), run)


def test_a_range_is_sampled_log_uniformly_and_reproducibly(run: RunConfig) -> None:
    space = MethodSpace(lr=LogUniform(low=1e-4, high=1e-2))
    sweep = SweepConfig(methods={"lora": space}, trials=40)
    rates = [p.run.optim.lr for p in points(sweep, run)]
    assert rates == [p.run.optim.lr for p in points(sweep, run)]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 10 <= sum(rate < 1e-3 for rate in rates) <= 30


def test_no_learning_rate_of_a_range_is_tried_twice_at_a_rank(run: RunConfig) -> None:
    """There are eleven of three digits, of which sixteen draws would give some twice."""
    narrow = LogUniform(low=1e-3, high=1.1e-3)
    sweep = SweepConfig(methods={"lora": MethodSpace(ranks=(4, 8), lr=narrow)}, trials=16)
    found = points(sweep, run)
    check_distinct(found)
    assert [sum(p.run.method.rank == rank for p in found) for rank in (4, 8)] == [8, 8]
    assert [p.key for p in found] == [p.key for p in points(sweep, run)]
    sweep = SweepConfig(methods={"lora": MethodSpace(lr=narrow)}, trials=16)
    with pytest.raises(ConfigError, match=r"methods\.lora\.lr: .* too few .* for 16 trials; widen the range"):
        points(sweep, run)


@pytest.mark.parametrize(
    ("methods", "name"),
    [
        ({"lora": MethodSpace(ranks=(4, 8, 4))}, "lora-r4-lr0.002-s0"),
        ({"lora": MethodSpace(lr=(1e-3, 2e-3, 0.001))}, "lora-r16-lr0.001-s0"),
        ({"lora": MethodSpace(lr=(1e-3, 1.0000001e-3))}, "lora-r16-lr0.001-s0"),
        ({"full": MethodSpace(ranks=(4, 8))}, "full-lr0.002-s0"),
        ({"peft:LoRA": MethodSpace(), "peft:lora": MethodSpace()}, "peft:LoRA-r16-lr0.002-s0"),
    ],
)
def test_trials_that_have_the_same_name_are_refused(
    run: RunConfig, methods: dict[str, MethodSpace], name: str
) -> None:
    with pytest.raises(ConfigError, match=f"2 trials have the name {name}: "):
        check_distinct(points(SweepConfig(methods=methods), run))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"methods": {"lorra": {}}}, "unknown method 'lorra'; did you mean 'lora'"),
        ({"methods": {}}, "name at least one method"),
        ({"methods": {"lora": {"rank": 8}}}, "unknown key 'methods.lora.rank'; did you mean 'ranks'"),
        ({"methods": {"lora": {"ranks": [0]}}}, "ranks start at 1"),
        ({"methods": {"lora": {"lr": [-1.0]}}}, "all above 0"),
        ({"methods": {"lora": {"lr": [1e-3, math.nan]}}}, "all above 0 and finite"),
        ({"methods": {"lora": {"lr": {"low": 1e-3, "high": math.inf}}}}, r"lr\.high: .* finite"),
        ({"methods": {"lora": {"lr": {"low": 1e-2, "high": 1e-3}}}}, "low must be below high"),
        ({"methods": {"lora": {}}, "seeds": [1, 1]}, "none twice"),
        ({"methods": {"lora": {}}, "slots": 0}, "needs at least one slot, or auto"),
    ],
)
def test_search_spaces_that_make_no_sense_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(SweepConfig, change)


def test_every_setting_of_a_method_reaches_its_runs(run: RunConfig) -> None:
    methods = {
        "rc3la": MethodSpace(ranks=(4, 8), chain=ChainConfig(links=5), dropout=0.1),
        "cola": MethodSpace(chain=ChainConfig(links=2, epochs=3), rslora=True, targets=("q_proj", "v_proj")),
        "rac": MethodSpace(),
        "lora_plus": MethodSpace(lr_ratio=4.0, rank_pattern={"down_proj": 2}),
    }
    found = {
        (p.run.method.name, p.run.method.rank): p.run.method
        for p in points(SweepConfig(methods=methods), run)
    }
    assert {config.chain for (name, _), config in found.items() if name == "rc3la"} == {ChainConfig(links=5)}
    assert found["rc3la", 8].dropout == 0.1
    assert found["cola", 16].chain == ChainConfig(links=2, epochs=3)
    assert found["cola", 16].scale == 8.0
    assert found["cola", 16].targets == ("q_proj", "v_proj")
    assert found["rac", 16].links == ChainConfig().links > 1
    assert found["lora_plus", 16].lr_ratio == 4.0
    assert found["lora_plus", 16].rank_pattern == {"down_proj": 2}
    assert len({point.key for point in points(SweepConfig(methods=methods), run)}) == 5
    other = {**methods, "rac": MethodSpace(chain=ChainConfig(links=8))}
    keys = [
        {p.key for p in points(SweepConfig(methods=each), run) if p.run.method.name == "rac"}
        for each in (methods, other)
    ]
    assert not keys[0] & keys[1]


def test_annealing_reaches_every_point_and_its_name(run: RunConfig) -> None:
    anneal = AnnealConfig(rank=8)
    methods = {"lora": MethodSpace(ranks=(64, 32), anneal=anneal), "cla": MethodSpace(ranks=(64,))}
    found = {point.name: point.run for point in points(SweepConfig(methods=methods), run)}
    assert list(found) == ["lora-r64to8-lr0.002-s0", "cla-r64-lr0.002-s0", "lora-r32to8-lr0.002-s0"]
    assert [each.anneal for each in found.values()] == [anneal, None, anneal]
    assert [each.final_rank for each in found.values()] == [8, 64, 8]
    plain = points(SweepConfig(methods={"lora": MethodSpace(ranks=(64,))}), run)
    assert plain[0].key not in {point.key for point in points(SweepConfig(methods=methods), run)}


@pytest.mark.parametrize(
    ("name", "space", "error", "match"),
    [
        (
            "lora",
            MethodSpace(chain=ChainConfig()),
            MethodError,
            "'lora' is no chain, so method.chain does nothing",
        ),
        (
            "cla",
            MethodSpace(lr_ratio=2.0),
            MethodError,
            "method.lr_ratio does nothing: drop it, or use lora_plus",
        ),
        ("paca", MethodSpace(dropout=0.1), MethodError, "'paca' trains the base's own weights"),
        ("rac", MethodSpace(chain=ChainConfig(links=7)), ConfigError, "doesn't divide optim.steps"),
        ("cla", MethodSpace(anneal=AnnealConfig(rank=4)), MethodError, "anneal is for lora and lora_plus"),
        (
            "lora",
            MethodSpace(ranks=(32, 8), anneal=AnnealConfig(rank=8)),
            ConfigError,
            "rank 8, which is not below method.rank",
        ),
        ("lora", MethodSpace(targets=()), ConfigError, r"sweep\.methods\.lora: targets is empty"),
        (
            "lora",
            MethodSpace(rank_pattern={"q_(proj": 4}),
            ConfigError,
            r"methods\.lora: rank_pattern: 'q_\(proj' is no regular expression",
        ),
        (
            "lora",
            MethodSpace(ranks=(4096,), anneal=AnnealConfig(rank=1, stages=50)),
            ConfigError,
            "take fewer",
        ),
    ],
)
def test_settings_without_effect_are_refused(
    run: RunConfig, name: str, space: MethodSpace, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        points(SweepConfig(methods={name: space}), run)


def test_lanes_are_used_unless_zero_3_partitions_the_base(run: RunConfig) -> None:
    lora = {"lora": MethodSpace()}
    assert check_executor(SweepConfig(methods=lora), run) == "lane"
    full = {**lora, "full": MethodSpace()}
    assert check_executor(SweepConfig(methods=full), run) == "lane"
    assert check_executor(SweepConfig(methods=full, executor="isolated"), run) == "isolated"
    sharded = run.model_copy(update={"scale": ScaleConfig(zero=3)})
    with pytest.raises(ConfigError, match="ZeRO-3 partitions the base"):
        check_executor(SweepConfig(methods=lora, executor="lane"), sharded)


def base(**settings: object) -> nn.Module:
    """A base without weights, whose configuration has some settings."""
    model = nn.Module()
    values = SimpleNamespace(to_dict=lambda: settings)
    model.config = SimpleNamespace(get_text_config=lambda: values)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("changes", "sweep", "settings", "reason"),
    [
        (
            {},
            {"methods": {"paca": MethodSpace(), "full": MethodSpace()}},
            {},
            "'paca' changes the base, or has layers of its own",
        ),
        ({}, {"executor": "isolated"}, {}, "executor: isolated gives each trial workers of its own"),
        ({}, {}, {"attention_dropout": 0.1}, r"random numbers \(attention_dropout: 0.1\)"),
        ({"scale": {"workers": 2}, "optim": {"rows_per_step": 2}}, {}, {}, "scale.workers is 2"),
        # Its trials run isolated, which nobody has asked for.
        ({"scale": {"zero": 3}}, {}, {}, "scale.zero is 3"),
        ({"scale": {"zero": 2, "offload": True}}, {}, {}, "scale.offload is set"),
        ({"scale": {"activation_checkpointing": True}}, {}, {}, "scale.activation_checkpointing is set"),
        ({"model": {"task": "sequence_classification"}}, {}, {}, "model.task is sequence_classification"),
    ],
)
def test_slots_are_refused_if_no_trials_can_share_a_batch(
    run: RunConfig, changes: dict[str, Any], sweep: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    """Only if they are asked for by number; otherwise trials take turns."""
    whole = {name: getattr(run, name) for name in RunConfig.model_fields}
    sections = {name: whole[name].model_copy(update=values) for name, values in changes.items()}
    run = RunConfig(**{**whole, **sections})
    for slots in ("auto", 1, 4):
        config = SweepConfig(**{"methods": {"lora": MethodSpace()}, **sweep, "slots": slots})
        trials = points(config, run)
        if slots == 4:
            with pytest.raises(ConfigError, match=rf"sweep.slots is 4, .*: .*{reason}.*; drop slots"):
                check_slots(config, trials, base(**settings))
        else:
            assert check_slots(config, trials, base(**settings)) == (1, ())


def test_trials_that_take_turns_beside_slots_are_counted(run: RunConfig) -> None:
    both = SweepConfig(methods={"lora": MethodSpace(), "paca": MethodSpace(lr=(1e-3, 2e-3))}, slots=4)
    slots, notes = check_slots(both, points(both, run), base())
    assert slots == 4
    (note,) = notes
    assert note.startswith("2 of 3 trials take turns, such as paca-r16-lr0.001-s0: 'paca' changes the base")
    shared = SweepConfig(methods={"lora": MethodSpace(lr=(1e-3, 2e-3))}, slots=4)
    assert check_slots(shared, points(shared, run), base()) == (4, ())


def test_lanes_on_gpus_find_out_how_many_slots_are_fastest(run: RunConfig) -> None:
    config = SweepConfig(methods={"lora": MethodSpace()})
    run = run.model_copy(update={"scale": ScaleConfig(device="cuda")})
    assert check_slots(config, points(config, run), base()) == (None, ())


def test_rungs_end_before_the_last_step() -> None:
    sweep = SweepConfig(methods={"lora": MethodSpace()}, grace=10, reduction=2)
    assert rungs(sweep, 40) == [10, 20]
    assert rungs(sweep, 41) == [10, 20, 40]
    assert rungs(sweep, 10) == []

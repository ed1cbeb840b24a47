"""The settings of a run, and the DeepSpeed configuration that is derived from them."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest

from rayft.config import parse
from rayft.errors import ConfigError, TrainError
from rayft.models.inject import inject
from rayft.train.deepspeed import build_engine, check_settings, destroy, engine_config
from rayft.train.run import OptimConfig, RunConfig, ScaleConfig
from rayft.train.session import Session

DATA = {"name": "needle_haystack", "train": 8, "val": 2, "test": 2}


def test_the_learning_rate_warms_up_and_decays() -> None:
    constant = OptimConfig(lr=1.0, warmup=4, steps=8)
    assert [constant.lr_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = OptimConfig(lr=1.0, warmup=0, steps=4, schedule="linear")
    assert [linear.lr_at(step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_the_engine_configuration_follows_from_the_settings(run: RunConfig) -> None:
    scale = ScaleConfig(workers=2, accumulation=2, zero=2, dtype="bfloat16", device="cpu", offload=True)
    optim = OptimConfig(rows_per_step=8, clip=0.5)
    config = engine_config(
        run.model_copy(
            update={
                "scale": scale,
                "optim": optim,
                "deepspeed": {"zero_optimization": {"reduce_bucket_size": 7}},
            }
        )
    )
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "reduce_bucket_size": 7,
    }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scale": {"workers": 2}}, "multiple of scale.workers"),
        ({"optim": {"steps": 2, "warmup": 3}}, r"warmup \(3\) must be at most optim.steps \(2\).* 2 or less"),
        (
            {"method": {"name": "cola", "chain": {"links": 4}}, "optim": {"steps": 4}},
            r"must be at most a link's 1 steps",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "zero_optimization.stage is scale.zero"),
        ({"scale": {"graphs": True, "device": "cuda", "zero": 3}}, "graphs needs a GPU, ZeRO 0 to 2"),
        (
            {"scale": {"graphs": True, "device": "cuda", "zero": 1, "accumulation": 2}},
            "graphs with accumulation above 1 needs zero: 2",
        ),
        (
            {"scale": {"graphs": True, "device": "cuda"}, "model": {"task": "sequence_classification"}},
            "graphs is for causal",
        ),
        ({"scale": {"fused": True, "device": "cpu"}}, "fused needs a GPU and ZeRO 0 to 2"),
        ({"scale": {"fused": True, "zero": 3}}, "fused needs a GPU and ZeRO 0 to 2"),
        (
            {"scale": {"fused": True, "device": "cuda"}, "model": {"task": "sequence_classification"}},
            "fused is for causal",
        ),
        ({"scale": {"gpu_share": 0.5, "workers": 2}}, "gpu_share below 1"),
        ({"scale": {"offload": True}}, "offload needs zero"),
        ({"scale": {"zero": 0, "dtype": "bfloat16"}}, "no fp32 master weights"),
        (
            {"deepspeed": {"train_batch_size": 4, "optimizer": {}}},
            "train_batch_size is optim.rows_per_step, optimizer is optim; set them there",
        ),
        ({"deepspeed": {"scheduler": {"type": "WarmupLR"}}}, "scheduler is optim.schedule; set it there"),
        ({"deepspeed": {"gradient_clipping": 0.1}}, "gradient_clipping is optim.clip; set it there"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "bf16.enabled is scale.dtype; set it there"),
        ({"deepspeed": {"bfloat16": {"enabled": True}}}, "bfloat16 is scale.dtype; set it there"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, r"fp16 is scale.dtype \(float32 or bfloat16\)"),
        ({"optim": {"lr": 0}}, "greater than 0"),
        ({"optim": {"lr": math.inf}}, "a finite number"),
        ({"optim": {"betas": (0.9, 1.0)}}, "0 or more, and below 1"),
        ({"optim": {"steps": 2.5}}, "optim.steps"),
    ],
)
def test_contradicting_settings_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(RunConfig, {"data": DATA, **change})


def test_settling_decides_every_auto() -> None:
    settled = ScaleConfig().settled()
    assert settled.device == "cpu"
    assert settled.dtype in ("float32", "bfloat16")
    assert settled.threads
    assert settled.zero == (2 if settled.dtype == "bfloat16" else 0)
    assert ScaleConfig(zero=0).settled().dtype == "float32"


def test_graphs_with_accumulation_are_refused_once_the_zero_stage_is_known() -> None:
    scale = ScaleConfig(device="cuda", dtype="float32", graphs=True, accumulation=2)
    with pytest.raises(ConfigError, match="needs zero: 2"):
        scale.settled()
    sharded = ScaleConfig(device="cuda", zero=3).settled()
    assert (sharded.accumulation, sharded.activation_checkpointing, sharded.graphs) == (None, None, False)
    assert ScaleConfig(device="cuda", dtype="bfloat16", graphs=True, accumulation=2).settled().graphs


def test_a_destroyed_engine_is_freed(run: RunConfig, session: Session) -> None:
    inject(session.loaded.model, run.method, 0)
    for zero in (0, 2):
        scaled = run.model_copy(update={"scale": run.scale.model_copy(update={"zero": zero})})
        engine = build_engine(scaled, session.loaded.model)
        gone = weakref.ref(engine)
        destroy(engine)
        del engine
        gc.collect()
        assert gone() is None, "the model still holds the engine"
        assert not session.loaded.model._forward_pre_hooks


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"zero_optimisation": {}}, "has no setting 'zero_optimisation'; did you mean 'zero_optimization'"),
        ({"zero_optimization": {"reduce_buket_size": 7}}, "refuses reduce_buket_size: Extra inputs"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "refuses reduce_bucket_size: .* integer"),
        ({"zero_optimization": 7}, "can't read these settings: .* mapping, not int"),
    ],
)
def test_what_deepspeed_would_refuse_or_ignore_is_refused_before_workers_start(
    run: RunConfig, settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_settings(run.model_copy(update={"deepspeed": settings}))


def test_settings_that_deepspeed_knows_are_accepted(run: RunConfig) -> None:
    for settings in (
        {"zero_optimization": {"reduce_bucket_size": 7}},
        {"wall_clock_breakdown": True},
        {"activation_checkpointing": {"profile": True}},
        {"flops_profiler": {"enabled": False}},
        {"tensorboard": {"enabled": False}},
    ):
        check_settings(run.model_copy(update={"deepspeed": settings}))


def test_a_configuration_that_deepspeed_refuses_raises_a_train_error(
    run: RunConfig, session: Session
) -> None:
    session.loaded.model.requires_grad_(True)
    wrong = run.model_copy(update={"deepspeed": {"zero_optimization": {"stage": 9}}})
    with pytest.raises(TrainError, match="DeepSpeed refused"):
        build_engine(wrong, session.loaded.model)

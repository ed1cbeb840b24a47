"""A run over flat parameters takes the steps that DeepSpeed takes over a model's own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rayft.numerics import assert_close, tolerance
from rayft.train import flat, trainer
from rayft.train.flat import RunEngine
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker
from tests.unit.train.curves import WIDEST
from tests.unit.train.runs import changed, with_method


@pytest.mark.parametrize(("dtype", "zero"), [("float32", 0), ("bfloat16", 2), ("bfloat16", 1)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_clipped_as_by_deepspeed(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, zero: int, accumulation: int
) -> None:
    scale = {"dtype": dtype, "zero": zero, "accumulation": accumulation}
    run = changed(run, scale=scale, optim={"clip": 0.02, "lr": 1e-2, "rows_per_step": 4})
    flat = Trainer(run, Session.open(run, Worker()), Reporter(), tmp_path / "flat").fit()
    monkeypatch.setattr(trainer, "flattens", lambda _: False)
    plain = Trainer(run, Session.open(run, Worker()), Reporter(), tmp_path / "plain").fit()
    allowed = tolerance(getattr(torch, dtype), WIDEST, depth=run.optim.steps)
    for (_, one), (_, other) in zip(flat.train_curve, plain.train_curve, strict=True):
        assert abs(one - other) <= allowed * abs(other)


@pytest.mark.parametrize(
    ("dtype", "zero"), [("float32", 0), ("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_those_of_torchs_optimizer(
    run: RunConfig, dtype: str, zero: int, accumulation: int
) -> None:
    scale = {"dtype": dtype, "zero": zero, "accumulation": accumulation}
    run = changed(with_method(run, "lora_plus"), scale=scale, optim={"clip": 0.5})
    torch.manual_seed(0)
    model = torch.nn.ParameterDict({
        name: torch.nn.Parameter(torch.randn(7, 5, dtype=getattr(torch, dtype)))
        for name in ("lora_A", "lora_B")
    })  # fmt: skip
    begun = {name: one.detach().float().clone() for name, one in model.items()}
    masters = {name: one.clone().requires_grad_() for name, one in begun.items()}
    engine = RunEngine(run, model)
    groups = zip(engine.parts, engine.optimizer.param_groups, strict=True)
    expected = torch.optim.AdamW([
        {"params": [masters[name] for name in part.parameters], "lr": group["lr"], "betas": group["betas"],
         "weight_decay": group["weight_decay"]}
        for part, group in groups
    ], foreach=False)  # fmt: skip
    for _ in range(4):
        for _ in range(accumulation):
            factors = {name: torch.randn_like(one) for name, one in model.items()}
            engine.backward(torch.stack([(model[name] * factors[name]).sum() for name in model]).sum())
            engine.step()
            for name, one in masters.items():
                (one * factors[name].float() / accumulation).sum().backward()
        torch.nn.utils.clip_grad_norm_(masters.values(), run.optim.clip)
        expected.step()
        expected.zero_grad()
    assert engine.global_steps == 4
    for name, one in engine.masters().items():
        # DeepSpeed may reduce the sum of micro-batches in the model's dtype.
        assert_close(one.weight - begun[name], masters[name] - begun[name], getattr(torch, dtype), 70)
    engine.leave()


@pytest.mark.parametrize(("dtype", "zero"), [("float32", 0), ("bfloat16", 2)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_no_weight(
    run: RunConfig, dtype: str, zero: int, bad: float
) -> None:
    run = changed(run, scale={"dtype": dtype, "zero": zero}, optim={"weight_decay": 0.0})
    own = Session.open(run, Worker())
    fitted = Trainer(run, own, Reporter(), Path())
    trainer.inject(fitted.model, run.method, run.seed, None)
    engine = RunEngine(run, fitted.model)
    before = {name: one.weight for name, one in engine.masters().items()}
    first = next(iter(p for p in fitted.model.parameters() if p.requires_grad))
    engine.backward(first.sum() * bad)
    assert engine.norm is not None
    assert not engine.norm.isfinite()
    engine.step()
    for name, one in engine.masters().items():
        assert torch.equal(one.weight, before[name])
    engine.leave()


def test_gradients_that_nothing_adds_to_need_no_reduction(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = changed(run, scale={"dtype": "bfloat16", "zero": 2}, optim={"clip": 0.5})
    found = []
    for reduces in (False, True):
        model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(7, 5, bias=False, dtype=torch.bfloat16)})
        torch.manual_seed(0)
        torch.nn.init.normal_(model["lora_A"].weight)
        if reduces:
            monkeypatch.setattr(flat, "_nothing_to_add", lambda _: False)
        engine = RunEngine(run, model)
        for scale in (1.0, 3.0):
            engine.backward((model["lora_A"].weight * scale).square().sum())
            engine.step()
        found.append([*engine.masters().values()])
        assert engine.global_steps == 2
        engine.leave()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert one.moments is not None
        assert other.moments is not None
        assert torch.equal(one.moments.mean, other.moments.mean)

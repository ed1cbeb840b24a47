"""A session's base is fused where that is wanted and right, and a fused base trains as the plain one does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.errors import ConfigError
from rayft.models import fuse as pieces
from rayft.models.fuse import fuse, is_fused, plainly
from rayft.numerics import assert_close
from rayft.train import fused
from rayft.train import session as sessions
from rayft.train.fused import fuse_base, fuse_checked
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker
from tests.unit.train.curves import WIDEST, assert_same_losses
from tests.unit.train.runs import changed, with_method
from tests.unit.train.test_packed import assert_same, packed, variants

TOKENS = torch.arange(60).remainder(37) + 40


def on_gpu(run: RunConfig, **scale: Any) -> RunConfig:
    """Return a run as it is on a GPU; the models of these tests are on the CPU."""
    return changed(run, scale={"device": "cuda", **scale})


def wrong(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    found: torch.Tensor = RIGHT(x, *rest)
    return found * 1.2


def broken(*_: Any) -> torch.Tensor:
    raise OSError("no compiler\non this machine")


def late(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Compute the right value with a wrong gradient."""
    found: torch.Tensor = RIGHT(x, *rest)
    return found.detach() - (found - found.detach())


RIGHT = pieces.gated


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (wrong, "change the loss of 59 tokens by"),
        (late, "change the gradient by"),
        (broken, "fused operations failed: OSError: no compiler"),
    ],
)
def test_a_base_that_would_change_stays_plain(
    session: Session, monkeypatch: pytest.MonkeyPatch, operation: Any, reason: str
) -> None:
    model = session.loaded.model
    # As if only the compiled form were wrong: the small copies have shown that the module is known.
    fuse(model)
    monkeypatch.setattr(pieces, "gated", operation)
    monkeypatch.setattr(fused, "fuse", lambda _: {"layers": 2})
    passes = fused._passes
    with plainly(model):
        first = iter([passes(model, TOKENS)])
    monkeypatch.setattr(fused, "_passes", lambda *given: next(first, None) or passes(*given))
    found = fuse_checked(model, TOKENS, torch.float32)
    assert reason in found
    assert not is_fused(model)


def test_a_base_is_fused_on_a_gpu_alone(run: RunConfig, session: Session) -> None:
    model, worker = session.loaded.model, Worker()
    assert not is_fused(model)
    for other in (run, on_gpu(run, fused=False), on_gpu(run, zero=3)):
        fuse_base(other, model, session.train, worker)
        assert not is_fused(model)
    fuse_base(on_gpu(run), model, session.train, worker)
    assert is_fused(model)


def test_a_base_that_cannot_be_fused_is_said_or_refused(
    run: RunConfig, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "fuse_checked", lambda *_: "it is of wood")
    with caplog.at_level(logging.WARNING):
        fuse_base(on_gpu(run), session.loaded.model, session.train, Worker())
    assert [record.message for record in caplog.records] == [
        "the base runs without fused operations: it is of wood"
    ]
    with pytest.raises(ConfigError, match=r"scale.fused is true, but it is of wood; drop it"):
        fuse_base(on_gpu(run, fused=True), session.loaded.model, session.train, Worker())


def test_a_model_without_known_parts_is_named(session: Session) -> None:
    model = session.loaded.model
    for part in model.modules():
        part.forward = part.forward
    found = fuse_checked(model, TOKENS, torch.float32)
    assert found == "rayft knows no part of LlamaForCausalLM that could be fused"


def test_sessions_that_train_are_fused(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RunConfig] = []
    monkeypatch.setattr(sessions, "fuse_base", lambda run, *_: asked.append(run))
    Session.open(run, Worker(), whole=True)
    assert not asked
    Session.open(run, Worker())
    assert asked == [run]


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("lora_plus", {"zero": 0}),
        ("lora_plus", {"zero": 2, "activation_checkpointing": True}),
        ("rc3la", {"zero": 1, "accumulation": 2}),
        ("full", {"zero": 0}),
    ],
)
def test_a_fused_base_trains_as_the_plain_one(
    run: RunConfig, session: Session, tmp_path: Path, name: str, scale: dict[str, Any]
) -> None:
    # AdamW's first step of each link is lr times a sign, which rounding can turn where a gradient is about 0.
    run = with_method(run, name, scale=scale, optim={"lr": 1e-4} if name == "rc3la" else {})
    other = Session.open(run, Worker())
    assert fuse(other.loaded.model)
    plain = Trainer(run, session, Reporter(), tmp_path / "plain").fit()
    found = Trainer(run, other, Reporter(), tmp_path / "fused").fit()
    assert_same_losses(plain, found)
    losses = [torch.tensor([loss for _, loss in result.val_curve]) for result in (found, plain)]
    assert_close(*losses, torch.float32, WIDEST, depth=run.optim.steps)


def test_packed_runs_over_a_fused_base_are_the_runs_alone(
    run: RunConfig, session: Session, tmp_path: Path
) -> None:
    runs = {name: variants(run)[name] for name in ("lora", "chain")}
    other = Session.open(run, Worker())
    fuse(other.loaded.model)
    together = packed(runs, other, tmp_path / "together")
    for name, one in runs.items():
        assert_same(Trainer(one, session, Reporter(), tmp_path / name).fit(), together[name])

"""Runs that take their steps together give what each gives alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.numerics import assert_close
from rayft.train.packed import Courses, Pack
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, TrainResult
from tests.unit.train.curves import WIDEST, assert_same_losses
from tests.unit.train.runs import changed, with_method


def packed(
    runs: Mapping[str, RunConfig], session: Session, folder: Path, evaluate_at: tuple[int, ...] = ()
) -> dict[str, TrainResult | Exception]:
    """Train runs together; all may continue at each evaluation."""
    pack = Pack(session)
    courses, ended = Courses[TrainResult](pack), dict[str, TrainResult | Exception]()
    for name, run in runs.items():
        trainer = Trainer(run, pack.session(), Reporter(), folder / name, evaluate_at, pack)
        courses.begin(name, trainer.course())
    while len(courses):
        for name in courses.questions:
            courses.answer(name, True)
        courses.step()
        ended |= courses.ended()
    pack.close()
    return ended


def variants(run: RunConfig) -> dict[str, RunConfig]:
    """Runs that differ in all that may differ in a pack."""
    return {
        "lora": with_method(run, "lora"),
        "plus": with_method(run, "lora_plus", seed=3, optim={"lr": 3e-3, "schedule": "linear"}),
        "cla": with_method(run, "cla", optim={"lr": 2e-2, "clip": 0.05, "weight_decay": 0.1}),
        "chain": with_method(run, "c3la", seed=1),
        "asym": changed(with_method(run, "asym"), optim={"betas": (0.8, 0.99), "steps": 4}),
        "dropout": changed(
            run, method={"rank": 8, "alpha": 4, "dropout": 0.2, "targets": ("q_proj", "down_proj")}, seed=5
        ),
        "cola": with_method(run, "cola", optim={"rows_per_step": 4}),
    }


def assert_same(alone: TrainResult, together: TrainResult | Exception) -> None:
    """Assert that two float32 runs differ only by the rounding of their steps."""
    assert isinstance(together, TrainResult), together
    assert_same_losses(alone, together)
    assert [step for step, _ in alone.val_curve] == [step for step, _ in together.val_curve]
    for (_, one), (_, other) in zip(alone.val_curve, together.val_curve, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    one, other = (AdapterArtifact.load(Path(result.folder)) for result in (alone, together))
    assert one.modules.keys() == other.modules.keys()
    for name, factors in one.modules.items():
        found = other.modules[name]
        assert found.scale == factors.scale
        assert_close(found.delta(), factors.delta(), torch.float32, WIDEST, depth=256)


def test_a_packed_run_is_the_run_alone(run: RunConfig, session: Session, tmp_path: Path) -> None:
    runs = variants(run)
    together = packed(runs, session, tmp_path / "together")
    for name, one in runs.items():
        alone = Trainer(one, Session.open(one, session.worker), Reporter(), tmp_path / name).fit()
        assert_same(alone, together[name])

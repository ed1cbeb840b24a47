"""A run keeps the weights of its best evaluation, and may end when no better one comes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayft.errors import DiskFullError
from rayft.methods.base import MethodConfig
from rayft.peft.folder import load_adapter
from rayft.squeeze.anneal import AnnealConfig
from rayft.train import trainer
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, TrainResult
from tests.reporter import RecordingReporter
from tests.unit.train.runs import DieAt, StopAt, changed, with_method

EVERY = {"every": 1, "trail": True, "checkpoint_seconds": 0}


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the validation losses of the evaluations to come."""

    def script(*values: float) -> None:
        left = list(values)
        monkeypatch.setattr(trainer, "validation_loss", lambda _: left.pop(0))

    return script


def step_kept(folder: Path, steps: Sequence[int] = range(1, 7)) -> list[int]:
    """Return the steps after which the adapters were what a run has kept."""
    kept = load_adapter(folder / "adapter").content_hash
    trail = folder / "trail"
    return [s for s in steps if load_adapter(trail / f"step-{s:06d}").content_hash == kept]


@pytest.mark.parametrize(
    ("name", "zero"), [("lora_plus", 0), ("lora", 3), ("rc3la", 2), ("paca", 0), ("peft:DoRA", 0)]
)
def test_the_adapter_of_the_least_loss_is_kept(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any, name: str, zero: int
) -> None:
    run = changed(run, evaluate=EVERY, scale={"zero": zero})
    if name.startswith("peft:"):
        run = changed(run, method=MethodConfig(name=name, rank=4))
    else:
        run = with_method(run, name)
    if zero == 3:
        session = Session.open(run, session.worker)
    losses(5.0, 4.0, 2.0, 3.0, 2.0, 2.5)
    result = Trainer(run, session, Reporter(), tmp_path).fit()
    assert (result.finished, result.steps, result.kept_step, result.val_loss) == (True, 6, 3, 2.0)
    assert step_kept(tmp_path) == [3]
    assert result.content_hash == load_adapter(result.folder).content_hash
    if name == "rc3la":
        # Two of its three links had begun.
        assert result.rank == 8


def test_the_weights_of_a_whole_model_are_kept(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any
) -> None:
    run = with_method(run, "full", evaluate={"every": 2})
    short = changed(run, optim={"steps": 4})
    losses(2.0, 1.0, 3.0)
    kept = Trainer(run, session, Reporter(), tmp_path / "kept").fit()
    assert (kept.kept_step, kept.val_loss) == (4, 1.0)
    losses(2.0, 1.0)
    other = Trainer(short, Session.open(run, session.worker), Reporter(), tmp_path / "short").fit()
    assert other.kept_step is None
    one, two = (load_file(Path(result.folder) / "model.safetensors") for result in (kept, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("keep", "values", "step"), [("last", (3.0, 1.0, 2.0), 6), ("best", (3.0, 2.0, 1.0), 6)]
)
def test_the_last_adapter_is_kept_if_it_is_the_best_or_asked_for(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any, keep: str, values: Any, step: int
) -> None:
    losses(*values)
    run = changed(run, evaluate={"trail": True, "keep": keep})
    result = Trainer(run, session, Reporter(), tmp_path).fit()
    assert (result.kept_step, result.val_loss) == (None, values[-1])
    assert step_kept(tmp_path, [2, 4, 6]) == [step]


def test_a_run_that_is_stopped_keeps_its_best_too(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any
) -> None:
    losses(1.0, 2.0)
    result = Trainer(changed(run, evaluate={"trail": True}), session, StopAt(4), tmp_path).fit()
    assert (result.finished, result.steps, result.kept_step, result.val_loss) == (False, 4, 2, 1.0)
    assert step_kept(tmp_path, [2, 4]) == [2]


@pytest.mark.parametrize("name", ["lora", "rc3la", "full"])
@pytest.mark.parametrize(("values", "best"), [((1.0, 2.0, 3.0), 2), ((2.0, 1.0, 3.0), 4)])
def test_a_resumed_run_keeps_what_was_best_before_it_was_killed(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any, name: str, values: Any, best: int
) -> None:
    run = with_method(run, name)
    losses(*values)
    whole = Trainer(run, session, Reporter(), tmp_path / "whole").fit()
    assert whole.kept_step == best
    losses(*values)
    session = Session.open(run, session.worker)
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, session, DieAt(4), tmp_path / "cut").fit()
    kept = tmp_path / "cut" / "checkpoint" / "step-000004" / "best"
    assert kept.is_dir() == (best != 4)
    losses(*values[2:])
    resumed = Trainer(run, Session.open(run, session.worker), Reporter(), tmp_path / "cut").fit()
    assert (resumed.kept_step, resumed.val_loss) == (best, 1.0)
    assert resumed.content_hash == whole.content_hash
    if name == "full":
        one, two = (load_file(Path(result.folder) / "model.safetensors") for result in (whole, resumed))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_whose_best_adapter_is_damaged_is_not_used(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any
) -> None:
    losses(2.0, 3.0)
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, session, DieAt(4), tmp_path).fit()
    weights = tmp_path / "checkpoint" / "step-000004" / "best" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    losses(4.0, 1.0)
    reporter = RecordingReporter()
    result = Trainer(run, session, reporter, tmp_path).fit()
    assert "continues from step 2" in reporter.notes[0]
    assert (result.kept_step, result.val_loss) == (None, 1.0)


def test_a_run_continues_from_a_checkpoint_of_an_earlier_version(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any
) -> None:
    losses(2.0, 3.0)
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, session, DieAt(4), tmp_path).fit()
    state = tmp_path / "checkpoint" / "step-000004" / "state.json"
    known = json.loads(state.read_text())
    state.write_text(json.dumps({k: v for k, v in known.items() if not k.startswith("best_")}))
    losses(4.0)
    result = Trainer(run, session, Reporter(), tmp_path).fit()
    assert (result.kept_step, result.val_loss) == (None, 4.0)


def test_an_annealed_run_keeps_the_best_of_its_last_rank(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any
) -> None:
    run = changed(run, method=MethodConfig(rank=8), anneal=AnnealConfig(rank=4, warmup=0), evaluate={**EVERY})
    first = trainer.Trainer(run, session, Reporter(), tmp_path).phases.plan[-1].first
    assert first == 3
    losses(1.0, 1.0, 1.0, 4.0, 2.0, 3.0)
    result = Trainer(run, session, Reporter(), tmp_path).fit()
    assert (result.kept_step, result.val_loss, result.rank) == (5, 2.0, 4)
    assert step_kept(tmp_path) == [5]


@pytest.mark.parametrize(("keep", "kept"), [("best", (2, 2.0)), ("last", (None, 2.2))])
def test_a_run_ends_when_no_better_evaluation_comes(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any, keep: str, kept: Any
) -> None:
    losses(3.0, 2.0, 2.1, 2.2)
    run = changed(run, evaluate={"every": 1, "patience": 2, "keep": keep})
    result = Trainer(run, session, Reporter(), tmp_path).fit()
    assert (result.finished, result.steps) == (True, 4)
    assert (result.kept_step, result.val_loss) == kept


def test_patience_counts_the_evaluations_before_an_interruption(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any
) -> None:
    run = changed(run, evaluate={"every": 1, "patience": 2})
    losses(2.0, 2.1)
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, session, DieAt(2), tmp_path).fit()
    losses(2.2)
    result = Trainer(run, session, Reporter(), tmp_path).fit()
    assert (result.finished, result.steps, result.kept_step) == (True, 3, 1)


def test_a_chain_ends_early_in_its_last_link_only(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any
) -> None:
    run = with_method(run, "rc3la", evaluate={"every": 1, "patience": 1})
    losses(1.0, 2.0, 2.0, 2.0, 2.0)
    result = Trainer(run, session, Reporter(), tmp_path).fit()
    assert (result.finished, result.steps, result.kept_step) == (True, 5, 1)


def test_nothing_is_left_where_the_disk_has_no_room_for_the_best(
    run: RunConfig, session: Session, tmp_path: Path, losses: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("rayft.train.best.Kept.save", save)
    losses(1.0, 2.0, 3.0)
    with pytest.raises(DiskFullError):
        Trainer(run, session, Reporter(), tmp_path).fit()
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-000002"]


def test_results_that_earlier_versions_wrote_can_be_read() -> None:
    assert TrainResult(True, 6, 1.0, []).kept_step is None

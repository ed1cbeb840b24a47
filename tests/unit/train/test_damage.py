"""A damaged checkpoint is never used: the run continues from the one before, with the same result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayft.train import checkpoint, checkpoint_folder, trainer
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, TrainResult
from rayft.train.worker import Worker
from tests.reporter import RecordingReporter
from tests.unit.damages import DAMAGES, half, one_bit
from tests.unit.train.curves import assert_same_losses
from tests.unit.train.runs import DieAt, changed

STEPS = (2, 4, 6)
"""Steps with an evaluation and a checkpoint, of a run of eight steps that dies at the last of these."""


FILES = ("state.json", "masters.safetensors")
DEEPSPEED = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cut")


@pytest.fixture
def long(run: RunConfig) -> RunConfig:
    return changed(run, optim={"steps": 8})


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """Objects that all tests of this module share."""
    return {}


@pytest.fixture
def session(long: RunConfig, known: dict[str, Any]) -> Session:
    """The session of all tests of this module."""
    if "session" not in known:
        known["session"] = Session.open(long, Worker())
    found: Session = known["session"]
    return found


@pytest.fixture
def whole(long: RunConfig, session: Session, cut: Path, known: dict[str, Any]) -> TrainResult:
    """The result of an undisturbed run; a run that died at its last checkpoint is saved beside it."""
    if "whole" not in known:
        known["whole"] = Trainer(long, session, Reporter(), cut / "whole").fit()
        with pytest.raises(KeyboardInterrupt):
            Trainer(long, session, DieAt(STEPS[-1]), cut / "dead").fit()
    found: TrainResult = known["whole"]
    return found


def resumed(
    run: RunConfig, session: Session, folder: Path, whole: TrainResult, *, exactly: bool = True
) -> RecordingReporter:
    """Continue a run, and check that its result is that of the undisturbed one."""
    reporter = RecordingReporter()
    result = Trainer(run, session, reporter, folder).fit()
    if not exactly:
        # The norm of the gradient is that of many parameters, and not of one flat one.
        assert_same_losses(whole, result)
        return reporter
    assert result.content_hash == whole.content_hash
    assert result.train_curve == whole.train_curve
    assert result.val_curve == whole.val_curve
    return reporter


def test_with_any_damage_to_any_file_a_run_continues_one_checkpoint_earlier(
    long: RunConfig, session: Session, cut: Path, tmp_path: Path, whole: TrainResult
) -> None:
    for damage in (*DAMAGES, one_bit):
        for name in FILES[damage is one_bit :]:
            folder = tmp_path / f"{damage.__name__}-{name}"
            shutil.copytree(cut / "dead", folder)
            damage(folder / "checkpoint" / "step-000006" / name)
            reporter = resumed(long, session, folder, whole)
            assert [step for step, _ in reporter.logged] == [5, 6, 7, 8], folder.name
            (note,) = reporter.notes
            assert "step-000006 can't be used" in note
            assert "continues from step 4" in note


@pytest.mark.parametrize("damage", [half, shutil.rmtree])
def test_without_an_intact_checkpoint_a_run_starts_again(
    long: RunConfig,
    session: Session,
    cut: Path,
    tmp_path: Path,
    whole: TrainResult,
    damage: Callable[[Path], None],
) -> None:
    shutil.copytree(cut / "dead" / "checkpoint", tmp_path / "checkpoint")
    for step in (4, 6):
        place = tmp_path / "checkpoint" / f"step-{step:06d}"
        damage(place if damage is shutil.rmtree else place / FILES[1])
    reporter = resumed(long, session, tmp_path, whole)
    assert len(reporter.logged) == 8
    assert len(reporter.notes) == (0 if damage is shutil.rmtree else 2)
    assert all("the run starts again" in note for note in reporter.notes)


def test_a_second_death_after_a_fallback_finds_intact_checkpoints(
    long: RunConfig, session: Session, cut: Path, tmp_path: Path, whole: TrainResult
) -> None:
    shutil.copytree(cut / "dead" / "checkpoint", tmp_path / "checkpoint")
    half(tmp_path / "checkpoint" / "step-000006" / FILES[1])
    with pytest.raises(KeyboardInterrupt):
        Trainer(long, session, DieAt(6), tmp_path).fit()
    assert sorted(path.name for path in (tmp_path / "checkpoint").glob("step-*")) == [
        "step-000004",
        "step-000006",
    ]
    reporter = resumed(long, session, tmp_path, whole)
    assert [step for step, _ in reporter.logged] == [7, 8]
    assert not reporter.notes


def by_deepspeed(place: Path, engine: Any, session: Session) -> None:
    checkpoint._write(place.parent, place.name, engine)


@pytest.fixture
def earlier(long: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoints of a run that died, written by DeepSpeed, as earlier versions wrote all of theirs."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_masters", by_deepspeed)
        patch.setattr(trainer, "flattens", lambda _: False)
        with pytest.raises(KeyboardInterrupt):
            Trainer(long, session, DieAt(STEPS[-1]), tmp_path).fit()
    return tmp_path / "checkpoint"


def test_a_checkpoint_that_deepspeed_wrote_is_continued(
    long: RunConfig, session: Session, earlier: Path, whole: TrainResult
) -> None:
    assert (earlier / "step-000006" / DEEPSPEED).is_file()
    reporter = resumed(long, session, earlier.parent, whole, exactly=False)
    assert [step for step, _ in reporter.logged] == [7, 8]


def as_0_1_0(folder: Path) -> None:
    """Rewrite checkpoints as rayft 0.1.0 wrote them: only the last, its state beside it, without hashes."""
    shutil.rmtree(folder / "step-000004")
    place = folder / "step-000006"
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").unlink()
    kept = {name: value for name, value in state.items() if name not in ("files", "identity")}
    (folder / "state.json").write_text(json.dumps({**kept, "run": state["identity"]["config"]}))


def test_a_checkpoint_of_0_1_0_is_continued_and_replaced(
    long: RunConfig, session: Session, earlier: Path, tmp_path: Path, whole: TrainResult
) -> None:
    as_0_1_0(earlier)
    reporter = resumed(long, session, tmp_path, whole, exactly=False)
    assert [step for step, _ in reporter.logged] == [7, 8]


@pytest.mark.parametrize("damage", [half, one_bit])
def test_a_damaged_checkpoint_of_0_1_0_is_not_used(
    long: RunConfig, session: Session, earlier: Path, tmp_path: Path, whole: TrainResult, damage: Any
) -> None:
    as_0_1_0(earlier)
    damage(earlier / "step-000006" / DEEPSPEED)
    reporter = resumed(long, session, tmp_path, whole)
    assert len(reporter.logged) == 8
    assert len(reporter.notes) == 1


def test_a_finished_run_keeps_one_checkpoint(
    long: RunConfig, session: Session, cut: Path, tmp_path: Path, whole: TrainResult
) -> None:
    shutil.copytree(cut / "dead" / "checkpoint", tmp_path / "checkpoint")
    checkpoint_folder.prune(tmp_path / "checkpoint", 1)
    assert [path.name for path in (tmp_path / "checkpoint").glob("step-*")] == ["step-000006"]
    assert checkpoint_folder.last_step(tmp_path / "checkpoint") == 6
    as_0 = tmp_path / "old"
    shutil.copytree(cut / "dead" / "checkpoint", as_0)
    as_0_1_0(as_0)
    checkpoint_folder.prune(as_0, 1)
    assert sorted(path.name for path in as_0.iterdir() if path.suffix != ".py") == [
        "state.json",
        "step-000006",
    ]
    assert resumed(long, session, tmp_path, whole).notes == []


def test_all_workers_use_the_checkpoint_that_rank_0_chooses(
    monkeypatch: pytest.MonkeyPatch, cut: Path, tmp_path: Path
) -> None:
    """A worker that sees other files than rank 0 uses the checkpoint that rank 0 has chosen."""
    sent: list[object] = []

    def broadcast(box: list[object], source: int) -> None:
        assert source == 0
        sent.extend(box)
        if box[0] is None:
            box[:] = sent[:1]

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    shutil.copytree(cut / "dead" / "checkpoint", tmp_path / "checkpoint")
    half(tmp_path / "checkpoint" / "step-000006" / FILES[1])
    now = checkpoint_folder.checkpoint_identity(tmp_path / "checkpoint")
    assert now is not None
    first = checkpoint.last_state(tmp_path / "checkpoint", now, Worker(0, 2))
    other = checkpoint.last_state(tmp_path / "elsewhere", now, Worker(1, 2))
    assert first == other
    assert first is not None
    assert first["step"] == 4

"""If the disk is full at any write of a run, the run raises one error, and later gives the same adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rayft.errors import DiskFullError
from rayft.peft.folder import load_adapter
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, TrainResult
from rayft.train.worker import Worker
from tests.disks import PAGE, Disk
from tests.reporter import RecordingReporter
from tests.unit.train.runs import changed, with_method


def assert_readable(folder: Path) -> None:
    """Check that all files that a run has left are complete, and that no other files take space."""
    for place in folder.glob("checkpoint/step-*"):
        state = json.loads((place / "state.json").read_text())
        assert {*state["files"], "state.json"} == {path.name for path in place.iterdir()}
    for adapter in [*folder.glob("adapter"), *folder.glob("trail/step-*")]:
        assert load_adapter(adapter).content_hash
    assert not [*folder.rglob(".*")]


def fill_up(run: RunConfig, session: Session, folder: Path, make_room: Callable[[int], None]) -> TrainResult:
    """Repeat a run, each time with a little more space, until it ends; return its result."""
    folder.mkdir()
    reached = 0
    for attempt in range(1000):
        make_room(attempt)
        reporter = RecordingReporter()
        try:
            found = Trainer(run, session, reporter, folder).fit()
        except DiskFullError as error:
            assert str(folder) in str(error)  # noqa: PT017  (of each attempt)
            assert_readable(folder)
        else:
            assert attempt > 10
            return found
        # Nothing that was saved is lost: each attempt begins at the last checkpoint of all earlier ones.
        first = reporter.logged[0][0] if reporter.logged else reached
        assert first >= reached
        reached = first
    raise AssertionError("it never ended")


def short(run: RunConfig) -> RunConfig:
    """Return a run of three steps that writes everything that a run can write after each step."""
    return changed(run, optim={"steps": 3}, evaluate={"every": 1, "trail": True})


def assert_fills_up(
    run: RunConfig, session: Session, disk: Disk, make_room: Callable[[int], None], whole: Path
) -> None:
    """Compare the result on a disk that is repeatedly full with that of an undisturbed run."""
    undisturbed = Trainer(run, session, Reporter(), whole).fit()
    found = fill_up(run, session, disk.folder / "trial", make_room)
    assert found.content_hash == undisturbed.content_hash
    assert (found.val_curve, found.train_curve) == (undisturbed.val_curve, undisturbed.train_curve)
    trails = [
        {path.name: load_adapter(path).content_hash for path in folder.glob("trail/step-*")}
        for folder in (whole, disk.folder / "trial")
    ]
    assert trails[0] == trails[1]
    assert len(trails[0]) == 3


def test_a_run_survives_a_full_disk_at_each_write(
    run: RunConfig, session: Session, disk: Disk, tmp_path: Path
) -> None:
    assert_fills_up(
        short(run), session, disk, lambda attempt: disk.resize(attempt * 4 * PAGE), tmp_path / "whole"
    )


def test_a_run_survives_a_lack_of_inodes_at_each_file(
    run: RunConfig, session: Session, disk: Disk, tmp_path: Path
) -> None:
    assert_fills_up(
        short(run), session, disk, lambda attempt: disk.hold_files(attempt + 1), tmp_path / "whole"
    )


def test_without_space_for_a_whole_model_nothing_is_left_of_it(
    run: RunConfig, session: Session, disk: Disk
) -> None:
    run = with_method(changed(run, optim={"steps": 1}, evaluate={"every": None}), "full")
    folder = disk.folder / "trial"
    for pages in (0, 1, 16):
        disk.leave(pages * PAGE)
        with pytest.raises(
            DiskFullError, match=rf"the disk of {folder}/model is full \(.* KiB needed, .* free\)"
        ):
            Trainer(run, Session.open(run, Worker()), Reporter(), folder).fit()
        assert not (folder / "model").exists()
    disk.leave(2**24)
    assert Trainer(run, Session.open(run, Worker()), Reporter(), folder).fit().bytes > 16 * PAGE

"""A full disk is an error of whoever writes, unlike a server that is away; the spool is sent later."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rayft.errors import DiskFullError
from rayft.tracking import TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.mlflow import MlflowTracker, flush_spool, prepare
from tests.disks import Disk


@pytest.fixture
def on_disk(disk: Disk, databases: Path) -> TrackerSpec:
    """A database, its artifacts and the spool, all on the disk."""
    shutil.copy(databases / "current.db", disk.folder / "mlflow.db")
    return prepare(tracker_spec(TrackingConfig(), disk.folder))


def track_until_full(tracker: MlflowTracker, run_id: str, folder: Path) -> int:
    """Log numbers until the tracker raises the error of the full disk; return how many it took."""
    for step in range(20_000):
        try:
            tracker.metrics(run_id, {f"loss_{number}": float(step) for number in range(8)}, step)
        except DiskFullError as error:
            assert f"the disk of {folder}" in str(error)  # noqa: PT017  (of whichever step)
            return step
        if step % 100 == 0:
            time.sleep(0.02)
    raise AssertionError("the disk was never full")


def logged(spec: TrackerSpec, run_id: str) -> list[int]:
    return sorted(point.step for point in MlflowClient(spec.uri).get_metric_history(run_id, "loss_0"))


def test_a_full_disk_of_the_spool_is_an_error_of_the_writer(
    disk: Disk, on_disk: TrackerSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with MlflowTracker(on_disk, interval=0.05) as tracker:
        run_id = tracker.run("a", "a")
        disk.leave(2**16)
        taken = track_until_full(tracker, run_id, disk.folder)
    disk.leave(2**24)
    assert not flush_spool(on_disk).pending
    assert logged(on_disk, run_id) == [*range(taken)]
    assert "away" not in caplog.text
    assert not (on_disk.spool / "rejected.log").exists()


def test_a_full_disk_of_mlflow_alone_is_an_error_of_the_writer(
    disk: Disk, on_disk: TrackerSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = replace(on_disk, spool=tmp_path / "spool")
    with MlflowTracker(spec, interval=0.05) as tracker:
        run_id = tracker.run("a", "a")
        disk.leave(0)
        taken = track_until_full(tracker, run_id, disk.folder)
        with pytest.raises(DiskFullError, match=f"the disk of {disk.folder} is full"):
            tracker.run("b", "b")
    with pytest.raises(DiskFullError, match=f"the disk of {disk.folder} is full"):
        flush_spool(spec)
    disk.leave(2**25)
    assert not flush_spool(spec).pending
    assert logged(spec, run_id) == [*range(taken)]
    assert "away" not in caplog.text


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_full_disk_of_the_artifacts_is_an_error_and_they_are_sent_later(
    disk: Disk, on_disk: TrackerSpec, tmp_path: Path, what: str
) -> None:
    spec = replace(on_disk, spool=tmp_path / "spool")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"0" * 2**20)
    with MlflowTracker(spec, interval=0.05) as tracker:
        run_id = tracker.run("a", "a")
        tracker.metrics(run_id, {"loss_0": 0.0})
    if what == "bytes":
        disk.leave(2**19)
    else:
        disk.hold_files(sum(1 for _ in disk.folder.rglob("*")) + 1)
    with MlflowTracker(spec, interval=0.05) as tracker:
        tracker.artifact(run_id, tmp_path / "adapter", "adapter")
    with pytest.raises(DiskFullError, match=f"the disk of {disk.folder}"):
        flush_spool(spec)
    disk.leave(2**22)
    disk.hold_files(1000)
    assert not flush_spool(spec).pending
    assert next(disk.folder.rglob("weights")).stat().st_size == 2**20


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_disk_that_is_full_from_the_start_is_an_error_of_prepare_and_of_run(
    disk: Disk, on_disk: TrackerSpec, what: str
) -> None:
    if what == "bytes":
        disk.leave(0)
    else:
        disk.hold_files(sum(1 for _ in disk.folder.rglob("*")))
    with pytest.raises(DiskFullError, match=f"the disk of {disk.folder}"):
        prepare(replace(on_disk, experiment="another"))
    with pytest.raises(DiskFullError, match=f"the disk of {disk.folder}"):
        MlflowTracker(on_disk).run("a", "a")

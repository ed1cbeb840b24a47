"""A run that was interrupted and resumed has the same metric histories as one that never was."""

import atexit
import math
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.entities import Metric

from rayft.files import locked
from rayft.tracking import TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.base import PENDING
from rayft.tracking.connection import connect
from rayft.tracking.mlflow import MlflowTracker, find_adapter, flush_spool, prepare, resolve_runs
from rayft.tracking.sender import Sender
from rayft.tracking.spool import Spool
from tests.mlflow_server import MlflowServer, Wire

STEPS, CHECKPOINT, KILLED = 24, 10, 17
IDLE = 3600.0
"""Seconds between two sends, so long that a tracker sends nothing by itself."""


def train(tracker: MlflowTracker, run_id: str, first: int, last: int, *, speed: float = 1.0) -> None:
    """Record what a lane records of some steps. `speed` stands for what is measured and differs each time."""
    for step in range(first, last + 1):
        numbers = {"train_loss": 1.0 / step, "grad_norm": math.nan if step % 5 == 0 else step, "speed": speed}
        tracker.metrics(run_id, numbers, step)
        if step % 4 == 0:
            tracker.metrics(run_id, {"val_loss": math.inf if step == 12 else 2.0 / step}, step)


def end(tracker: MlflowTracker, run_id: str, *, seconds: float = 1.0) -> None:
    tracker.metrics(run_id, {"train_seconds": seconds}, 0)
    tracker.metrics(run_id, {"best_val_loss": 2.0 / STEPS, "nothing": math.nan, "unbounded": math.inf})
    tracker.params(run_id, {"adapter_hash": "abc"})
    tracker.finish(run_id)


def killed(spec: TrackerSpec, tracker: MlflowTracker, number: int = 1) -> None:
    """Leave what a killed process leaves: the files of the tracker, as if its process had this number."""
    atexit.unregister(tracker.close)
    own = f".{socket.gethostname()}-{os.getpid()}.jsonl"
    for path in (path for path in Spool(spec.spool).files() if path.name.endswith(own)):
        other = path.with_name(f"{path.name.split('.')[0]}.host-{number}.jsonl")
        for one, target in ((path, other), (Path(f"{path}.sent"), Path(f"{other}.sent"))):
            if one.exists():
                one.rename(target)


def histories(spec: TrackerSpec, run_id: str) -> dict[str, list[Metric]]:
    client = connect(spec.uri)
    return {
        name: client.get_metric_history(run_id, name) for name in sorted(client.get_run(run_id).data.metrics)
    }


def points(found: dict[str, list[Metric]], *measured: str) -> dict[str, list[tuple[int, str]]]:
    """Return steps and values in the server's order, without the values of what is `measured`."""
    return {
        name: [(point.step, "" if name in measured else repr(point.value)) for point in history]
        for name, history in found.items()
    }


@pytest.fixture
def whole(spec: TrackerSpec) -> dict[str, list[tuple[int, str]]]:
    """The histories of a run that was not interrupted."""
    with MlflowTracker(spec, interval=0.05) as tracker:
        run_id = tracker.run("whole", "whole")
        train(tracker, run_id, 1, STEPS)
        end(tracker, run_id)
    found = points(histories(spec, run_id), "speed", "train_seconds")
    assert [step for step, _ in found["train_loss"]] == [*range(1, STEPS + 1)]
    return found


def all_sent(spec: TrackerSpec) -> None:
    assert flush_spool(spec).pending == 0


def nothing_sent(spec: TrackerSpec) -> None:
    pass


def half_sent(spec: TrackerSpec) -> None:
    (path,) = spec.spool.glob("*.host-1.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))
    all_sent(spec)
    path.write_text("".join(lines[len(lines) // 2 :]))


def sent_without_an_answer(spec: TrackerSpec) -> None:
    (path,) = spec.spool.glob("*.host-1.jsonl")
    text = path.read_text()
    all_sent(spec)
    path.write_text(text)


@pytest.mark.parametrize("left", [all_sent, nothing_sent, half_sent, sent_without_an_answer])
def test_steps_that_are_trained_again_are_recorded_once(
    spec: TrackerSpec, whole: dict[str, list[tuple[int, str]]], left: Callable[[TrackerSpec], None]
) -> None:
    first = MlflowTracker(spec, interval=IDLE)
    run_id = first.run("trial", "t0")
    first.params(run_id, {"rank": "8"})
    train(first, run_id, 1, KILLED)
    killed(spec, first)
    left(spec)
    with MlflowTracker(spec, interval=0.05) as second:
        assert second.run("trial", "t0") == run_id
        second.params(run_id, {"rank": "8"})
        train(second, run_id, CHECKPOINT + 1, STEPS, speed=3.0)
        end(second, run_id, seconds=2.0)
    assert flush_spool(spec).pending == 0
    found = histories(spec, run_id)
    assert points(found, "speed", "train_seconds") == whole
    for name, history in found.items():
        assert [p.timestamp for p in history] == sorted(p.timestamp for p in history), name
    # The values of the steps that were trained twice are those of the first time.
    assert [point.value for point in found["speed"]] == [1.0] * KILLED + [3.0] * (STEPS - KILLED)
    run = connect(spec.uri).get_run(run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"rank": "8", "adapter_hash": "abc"})
    assert not (spec.spool / "rejected.log").exists()


def test_a_finished_run_that_is_recorded_again_stays_what_it_is(spec: TrackerSpec) -> None:
    def record(seconds: float, best: float, *, restart: bool) -> str:
        with MlflowTracker(spec, interval=0.05) as tracker:
            run_id = tracker.run("base", "base", restart=restart)
            tracker.params(run_id, {"rank": "8"})
            tracker.metrics(run_id, {"train_seconds": seconds}, 0)
            tracker.metrics(run_id, {"score": best, "undefined": math.nan, "unbounded": -math.inf})
            tracker.finish(run_id)
        return run_id

    run_id = record(1.0, 0.5, restart=False)
    client = connect(spec.uri)
    before, run = histories(spec, run_id), client.get_run(run_id)
    record(2.0, 0.5, restart=False)
    assert points(histories(spec, run_id)) == points(before)
    assert client.get_run(run_id).info.end_time == run.info.end_time
    # Another process continues it, and measures another score: both are kept, the new one is shown.
    record(3.0, 0.75, restart=True)
    record(4.0, 0.75, restart=True)
    found = client.get_run(run_id)
    assert [point.value for point in histories(spec, run_id)["score"]] == [0.5, 0.75]
    assert found.data.metrics["score"] == 0.75
    assert found.data.metrics["train_seconds"] == 1.0
    assert found.info.end_time > run.info.end_time
    assert found.info.status == "FINISHED"


def test_senders_of_several_processes_take_turns_at_a_run(spec: TrackerSpec) -> None:
    first, second = Sender(spec), Sender(spec)
    run = {"op": "run", "name": "trial", "key": "t0", "parent": None, "tags": {}, "time": 1}
    run_id, _ = first.ensure(run)
    assert second.ensure(run) == (run_id, False)
    record = {"op": "metrics", "run": run_id}
    for step in range(1, 9):
        # Each has asked the server which points there are, and the other has sent some since.
        for sender in (first, second) if step % 2 else (second, first):
            value, time = (step, step) if sender is first else (-step, step + 1)
            sender.deliver([{**record, "values": {"loss": value}, "step": step, "time": time}])
    found = histories(spec, run_id)["loss"]
    assert [point.step for point in found] == [*range(1, 9)]


def test_what_a_killed_process_left_ends_no_run_that_goes_on(spec: TrackerSpec) -> None:
    first = MlflowTracker(spec, interval=IDLE)
    run_id = first.run("trial", "t0")
    first.metrics(run_id, {"loss": 1.0}, 1)
    Spool(spec.spool).append(run_id, {"run": run_id, "op": "finish", "status": "stopped", "time": 5})
    killed(spec, first)
    second = MlflowTracker(spec, interval=0.05)
    assert second.run("trial", "t0") == run_id
    assert list(spec.spool.glob("*.host-1.jsonl")) == []
    client = connect(spec.uri)
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert not {"rayft.status", "mlflow.note.content"} & {*run.data.tags}
    second.finish(run_id)
    second.close()
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["rayft.status"]) == ("FINISHED", "finished")
    assert run.info.end_time > 5


@contextmanager
def away(spec: TrackerSpec) -> Iterator[None]:
    """Move the database away."""
    database = Path(spec.uri.removeprefix("sqlite:///"))
    database.rename(database.with_suffix(".away"))
    try:
        yield
    finally:
        database.with_suffix(".away").rename(database)


def test_a_run_begun_while_mlflow_is_away_gets_its_id_later(
    spec: TrackerSpec, whole: dict[str, list[tuple[int, str]]]
) -> None:
    with away(spec):
        first = MlflowTracker(spec, interval=IDLE)
        parent = first.run("sweep", "sweep")
        trial = first.run("trial", "t0", parent=parent)
        assert [parent, trial] == ["key:sweep", "key:t0"]
        train(first, trial, 1, KILLED)
        killed(spec, first)
        assert resolve_runs(spec, [parent, trial, ""]) == {parent: parent, trial: trial, "": ""}
    with MlflowTracker(spec, interval=0.05) as second:
        # The resuming process creates the run before it sends what the first one left.
        resumed = second.run("trial", "t0", parent=parent)
        train(second, resumed, CHECKPOINT + 1, STEPS)
        end(second, resumed)
    ids = resolve_runs(spec, [parent, trial, resumed])
    assert ids[trial] == ids[resumed] == resumed
    assert connect(spec.uri).get_run(resumed).data.tags["mlflow.parentRunId"] == ids[parent]
    assert points(histories(spec, resumed), "speed", "train_seconds") == whole
    assert flush_spool(spec).pending == 0


def test_a_run_is_created_later_if_another_process_does_not_get_on(
    spec: TrackerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.tracking.sender._CREATE_SECONDS", 0.2)
    with MlflowTracker(spec) as tracker, ThreadPoolExecutor(1) as pool:
        with locked(spec.spool / "create.lock"):
            run_id = pool.submit(tracker.run, "a", "a").result(timeout=30)
        assert run_id == PENDING + "a"
    assert not resolve_runs(spec, [run_id])[run_id].startswith(PENDING)


def test_an_adapter_is_found_whose_run_waits_in_the_spool(spec: TrackerSpec) -> None:
    with away(spec):
        tracker = MlflowTracker(spec, interval=IDLE)
        end(tracker, tracker.run("trial", "t0"))
        killed(spec, tracker)
    assert find_adapter(spec, ["other", "abc"]) == resolve_runs(spec, ["key:t0"])["key:t0"] != ""


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back_has_whole_histories(server: MlflowServer, tmp_path: Path) -> None:
    wire = Wire(server)
    spec = prepare(tracker_spec(TrackingConfig(uri=wire.uri, experiment="resumed"), tmp_path / "out"))
    with MlflowTracker(spec, interval=0.05) as tracker:
        run_id = tracker.run("whole", "whole")
        train(tracker, run_id, 1, STEPS)
        end(tracker, run_id)
    whole = points(histories(spec, run_id), "speed", "train_seconds")

    first = MlflowTracker(spec, interval=IDLE)
    run_id = first.run("trial", "t0")
    train(first, run_id, 1, CHECKPOINT + 2)
    flush_spool(spec)
    wire.cut()
    train(first, run_id, CHECKPOINT + 3, KILLED)
    killed(spec, first)
    second = MlflowTracker(spec, interval=IDLE)
    pending = second.run("trial", "t0")
    assert pending == "key:t0"
    train(second, pending, CHECKPOINT + 1, STEPS - 2)
    killed(spec, second, 2)
    assert flush_spool(spec).pending > 0
    wire.mend()
    with MlflowTracker(spec, interval=0.05) as third:
        assert third.run("trial", "t0") == run_id
        train(third, run_id, CHECKPOINT + 1, STEPS)
        end(third, run_id)
    done = flush_spool(spec)
    assert (done.pending, done.rejected) == (0, 0)
    assert resolve_runs(spec, [pending]) == {pending: run_id}
    assert points(histories(spec, run_id), "speed", "train_seconds") == whole
    assert connect(spec.uri).get_run(run_id).info.status == "FINISHED"

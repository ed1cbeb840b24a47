import contextlib
import logging
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.store.db.utils import _upgrade_db

from rayft.errors import TrackingError
from rayft.tracking import TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.connection import connect
from rayft.tracking.mlflow import MlflowTracker, flush_spool, prepare
from rayft.tracking.spool import Spool
from tests.mlflow_server import MlflowServer, Wire

PROCESSES = multiprocessing.get_context("forkserver")
"""Makes processes of which each is new and all together import MLflow once."""
PROCESSES.set_forkserver_preload(["rayft.tracking.mlflow"])


def history(spec: TrackerSpec, run_id: str, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of every stored point, so that a point stored twice is seen twice."""
    points: list[Metric] = connect(spec.uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def write_points(spec: TrackerSpec, key: str, count: int) -> None:
    with MlflowTracker(spec, interval=0.05) as tracker:
        run_id = tracker.run(key, key)
        tracker.params(run_id, {"rank": "8"})
        for step in range(count):
            tracker.metrics(run_id, {"loss": step / 2, "accuracy": step}, step)
        tracker.finish(run_id)


def write_and_die(spec: TrackerSpec, count: int) -> None:
    tracker = MlflowTracker(spec, interval=0.05)
    run_id = tracker.run("dies", "dies")
    for step in range(count):
        tracker.metrics(run_id, {"loss": float(step)}, step)
        if step == count // 2:
            time.sleep(0.2)  # some of it is being sent
    os.kill(os.getpid(), signal.SIGKILL)


def test_database_and_files_lie_in_the_output_folder_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    spec = prepare(tracker_spec(TrackingConfig(), tmp_path / "out"))
    (tmp_path / "note.txt").write_text("x")
    with MlflowTracker(spec) as tracker:
        tracker.artifact(tracker.run("a", "a"), tmp_path / "note.txt", "notes")
    assert (tmp_path / "out" / "mlflow.db").is_file()
    assert [path.name for path in (tmp_path / "out" / "artifacts").rglob("note.txt")] == ["note.txt"]
    assert list(elsewhere.iterdir()) == []


def test_prepare_again_finds_the_same_experiment(spec: TrackerSpec) -> None:
    assert prepare(replace(spec, experiment_id="")).experiment_id == spec.experiment_id != ""


def revision(database: Path) -> list[tuple[str]]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT version_num FROM alembic_version").fetchall()


def test_threads_can_prepare_databases_at_the_same_time(tmp_path: Path) -> None:
    specs = [tracker_spec(TrackingConfig(), tmp_path / name) for name in "abc"]
    with ThreadPoolExecutor(3) as threads:
        assert all(spec.experiment_id for spec in threads.map(prepare, specs))


def test_prepare_migrates_an_old_database_and_keeps_a_copy(tmp_path: Path, databases: Path) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copy(databases / "older.db", database)
    assert prepare(tracker_spec(TrackingConfig(), tmp_path)).experiment_id
    old = revision(databases / "older.db")
    assert revision(database) == revision(databases / "current.db") != old
    assert revision(tmp_path / "mlflow.db.before-migration") == old


def interrupt_migrations(monkeypatch: pytest.MonkeyPatch, reached: str) -> None:
    def half(engine: sqlalchemy.Engine) -> None:
        _upgrade_db(engine)  # type: ignore[no-untyped-call]
        with engine.begin() as connection:
            text = sqlalchemy.text("UPDATE alembic_version SET version_num = :reached")
            connection.execute(text, {"reached": reached})
        raise KeyboardInterrupt

    monkeypatch.setattr("mlflow.store.db.utils._upgrade_db", half)


@pytest.mark.parametrize("older", [False, True], ids=["new", "older"])
def test_prepare_again_after_an_interrupted_one(
    older: bool, tmp_path: Path, databases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"
    if older:
        shutil.copy(databases / "older.db", database)
    spec = tracker_spec(TrackingConfig(), tmp_path)
    with monkeypatch.context() as patch:
        interrupt_migrations(patch, revision(databases / "older.db")[0][0])
        with pytest.raises(KeyboardInterrupt):
            prepare(spec)
    assert prepare(spec).experiment_id
    assert revision(database) == revision(databases / "current.db")
    copies = {"mlflow.db.before-migration"} if older else set()
    assert {path.name for path in tmp_path.glob("*mlflow.db*")} == {"mlflow.db", *copies}
    assert not older or revision(tmp_path / "mlflow.db.before-migration") == revision(databases / "older.db")


def test_commands_that_start_at_once_share_a_new_database(tmp_path: Path) -> None:
    uri = TrackingConfig(uri=f"sqlite:///{tmp_path / 'shared.db'}")
    specs = [tracker_spec(uri, tmp_path / name) for name in "ab"]
    with ProcessPoolExecutor(2, PROCESSES) as pool:
        first, second = pool.map(prepare, specs)
    assert first.experiment_id == second.experiment_id


def test_a_deleted_experiment_is_named_with_the_way_back(spec: TrackerSpec) -> None:
    connect(spec.uri).delete_experiment(spec.experiment_id)
    with pytest.raises(TrackingError, match=r"'rayft' was deleted.*mlflow experiments restore"):
        prepare(spec)


@pytest.mark.parametrize(
    "uri",
    ["http://127.0.0.1:9", "postgresql://me:secret@127.0.0.1:9/runs"],
    ids=["server", "database"],
)
def test_a_server_that_is_away_at_the_start_is_an_error_in_seconds(uri: str, tmp_path: Path) -> None:
    spec = tracker_spec(TrackingConfig(uri=uri), tmp_path)
    begin = time.monotonic()
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9.*MLFLOW_TRACKING_URI") as caught:
        prepare(spec)
    # With MLflow's own retries this takes minutes.
    assert time.monotonic() - begin < 60
    assert "secret" not in str(caught.value)


def test_a_server_that_never_answers_is_an_error_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.tracking.connection.SECONDS_TO_ANSWER", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        spec = tracker_spec(TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), tmp_path)
        begin = time.monotonic()
        with pytest.raises(TrackingError, match="can't be used"):
            prepare(spec)
        assert time.monotonic() - begin < 60


def test_limits_of_prepare_do_not_stay_in_the_environment(
    spec: TrackerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "33")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    prepare(spec)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "33"


def test_a_key_names_one_run_in_all_trackers(spec: TrackerSpec) -> None:
    with MlflowTracker(spec) as first, MlflowTracker(spec) as second:
        parent = first.run("sweep", "it's a sweep")
        ids = {
            first.run("trial", "t0", parent=parent),
            second.run("trial", "t0", parent=parent, tags={"rung": "2"}),
        }
        assert second.run("sweep", "it's a sweep") == parent
    assert len(ids) == 1
    run = connect(spec.uri).get_run(ids.pop())
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["rung"] == "2"


def test_a_finished_run_that_goes_on_is_running_again(spec: TrackerSpec) -> None:
    with MlflowTracker(spec) as tracker:
        run_id = tracker.run("trial", "t0")
        tracker.finish(run_id, "failed")
    assert connect(spec.uri).get_run(run_id).info.status == "FAILED"
    with MlflowTracker(spec) as tracker:
        assert tracker.run("trial", "t0") == run_id
        assert connect(spec.uri).get_run(run_id).info.status == "RUNNING"


def test_a_value_above_the_limit_is_cut_and_ends_in_a_note(spec: TrackerSpec) -> None:
    with MlflowTracker(spec) as tracker:
        run_id = tracker.run("a", "a")
        tracker.params(run_id, {"long": "x" * 7000, "short": "y"})
    params = connect(spec.uri).get_run(run_id).data.params
    assert params["long"].endswith("x... [cut: 7000 characters]")
    assert len(params["long"]) == 6000
    assert params["short"] == "y"


def test_more_values_than_one_request_takes_are_all_recorded(spec: TrackerSpec) -> None:
    with MlflowTracker(spec) as tracker:
        run_id = tracker.run("a", "a")
        tracker.params(run_id, {f"p{i}": str(i) for i in range(250)})
        tracker.metrics(run_id, {f"m{i}": i for i in range(1200)}, 1)
    run = connect(spec.uri).get_run(run_id)
    assert len(run.data.params) == 250
    assert len(run.data.metrics) == 1200


def test_a_value_that_mlflow_refuses_is_kept_in_a_log_and_all_others_are_recorded(
    spec: TrackerSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), MlflowTracker(spec) as tracker:
        run_id = tracker.run("a", "a")
        tracker.params(run_id, {"rank": "8"})
        tracker.params(run_id, {"rank": "16", "alpha": "32"})
        tracker.metrics(run_id, {"loss": 1.0, "bad*name": 2.0}, 1)
        tracker.metrics(run_id, {"loss": 0.5}, 2)
    run = connect(spec.uri).get_run(run_id)
    assert run.data.params == {"rank": "8", "alpha": "32"}
    assert run.data.tags["changed.rank"] == "16"
    assert history(spec, run_id, "loss") == [(1, 1.0), (2, 0.5)]
    rejected = (spec.spool / "rejected.log").read_text()
    assert "bad*name" in rejected
    assert '"rank"' not in rejected
    assert "bad*name" in caplog.text


def test_an_artifact_that_is_not_there_is_an_error(spec: TrackerSpec, tmp_path: Path) -> None:
    with MlflowTracker(spec) as tracker, pytest.raises(TrackingError, match="nothing_here"):
        tracker.artifact("any", tmp_path / "nothing_here")


def test_the_spec_can_be_pickled(spec: TrackerSpec) -> None:
    assert pickle.loads(pickle.dumps(spec)) == spec  # noqa: S301  (our own bytes)


def test_several_processes_write_one_sqlite_file(spec: TrackerSpec) -> None:
    # Two of them write to the same run.
    keys = ["t0", "t1", "t1"]
    workers = [PROCESSES.Process(target=write_points, args=(spec, key, 150)) for key in keys]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert flush_spool(spec).pending == 0
    client = connect(spec.uri)
    runs = {run.data.tags["rayft.key"]: run for run in client.search_runs([spec.experiment_id])}
    assert len(client.search_runs([spec.experiment_id])) == len(runs) == 2
    assert history(spec, runs["t0"].info.run_id, "loss") == [(step, step / 2) for step in range(150)]
    both = history(spec, runs["t1"].info.run_id, "accuracy")
    assert {step for step, _ in both} == set(range(150))
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_nothing_is_lost_when_the_writer_is_killed(spec: TrackerSpec) -> None:
    worker = PROCESSES.Process(target=write_and_die, args=(spec, 400))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    done = flush_spool(spec)
    assert done.pending == done.rejected == 0
    (run,) = connect(spec.uri).search_runs([spec.experiment_id])
    assert history(spec, run.info.run_id, "loss") == [(step, float(step)) for step in range(400)]
    assert list(spec.spool.glob("*.jsonl*")) == []


@pytest.mark.slow
def test_a_server_killed_in_the_middle_gets_every_metric_once(server: MlflowServer, tmp_path: Path) -> None:
    spec = prepare(tracker_spec(TrackingConfig(uri=server.uri, experiment="killed"), tmp_path / "out"))
    (tmp_path / "plot.svg").write_text("<svg/>")
    tracker = MlflowTracker(spec, interval=0.05)
    sweep = tracker.run("sweep", "sweep")
    trial = tracker.run("trial", "t0", parent=sweep)
    killer = threading.Timer(1.0, server.kill)  # while metrics are being sent
    killer.start()
    slowest = 0.0
    for step in range(300):
        begin = time.monotonic()
        tracker.metrics(trial, {"loss": float(step)}, step)
        slowest = max(slowest, time.monotonic() - begin)
        time.sleep(0.01)
    killer.join()
    late = tracker.run("trial", "t1", parent=sweep)
    assert late == "key:t1"
    tracker.metrics(late, {"loss": 1.0}, 1)
    tracker.artifact(late, tmp_path / "plot.svg", "plots")
    tracker.finish(late)
    tracker.finish(trial, "stopped")
    assert tracker.close().pending > 0
    # A call that waited for the server would take a minute.
    assert slowest < 30
    assert flush_spool(spec).pending > 0

    server.start()
    done = flush_spool(spec)
    assert done.pending == done.rejected == 0
    client = connect(spec.uri)
    assert history(spec, trial, "loss") == [(step, float(step)) for step in range(300)]
    assert client.get_run(trial).info.status == "KILLED"
    assert "as planned" in client.get_run(trial).data.tags["mlflow.note.content"]
    (created,) = [
        run for run in client.search_runs([spec.experiment_id]) if run.data.tags["rayft.key"] == "t1"
    ]
    assert history(spec, created.info.run_id, "loss") == [(1, 1.0)]
    assert created.data.tags["mlflow.parentRunId"] == sweep
    assert created.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(created.info.run_id, "plots")] == ["plots/plot.svg"]


@pytest.mark.slow
def test_the_thread_sends_by_itself_once_the_server_is_back(server: MlflowServer, tmp_path: Path) -> None:
    wire = Wire(server)
    spec = prepare(tracker_spec(TrackingConfig(uri=wire.uri, experiment="back"), tmp_path / "out"))
    with MlflowTracker(spec, interval=0.05) as tracker:
        run_id = tracker.run("trial", "t0")
        wire.cut()
        tracker.metrics(run_id, {"loss": float("nan"), "best": float("inf")}, 7)
        time.sleep(0.5)
        wire.mend()
        deadline = time.monotonic() + 90  # above the longest pause between two tries
        while not history(spec, run_id, "loss") and time.monotonic() < deadline:
            time.sleep(0.1)
        ((step, value),) = history(spec, run_id, "loss")
    assert step == 7
    assert math.isnan(value)
    assert history(spec, run_id, "best")[0][1] > 1e300


def test_a_repeat_after_a_lost_answer_changes_nothing(spec: TrackerSpec) -> None:
    tracker = MlflowTracker(spec)
    run_id = tracker.run("a", "a")
    tracker.metrics(run_id, {"loss": 1.0}, 1)
    tracker.params(run_id, {"rank": "8"})
    path = Spool(spec.spool).path(run_id)
    text = path.read_text()
    assert tracker.close().pending == 0
    path.write_text(text)  # as if the answer had been lost
    done = flush_spool(spec)
    assert (done.sent, done.pending, done.rejected) == (2, 0, 0)
    assert history(spec, run_id, "loss") == [(1, 1.0)]


def test_after_an_error_of_any_kind_sending_is_tried_again(
    spec: TrackerSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a driver's bug")

    with MlflowTracker(spec, interval=0.02) as tracker:
        run_id = tracker.run("a", "a")
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_batch", broken)
            tracker.metrics(run_id, {"loss": 1.0}, 1)
            time.sleep(0.3)
        assert "MLflow is away; tracked data is kept in" in caplog.text
        assert "a driver's bug" in caplog.text
    assert history(spec, run_id, "loss") == [(1, 1.0)]


def test_importing_tracking_imports_no_mlflow() -> None:
    code = "import sys, rayft.tracking, rayft.tracking.spool; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_fluent_state_is_touched(spec: TrackerSpec) -> None:
    import mlflow

    with MlflowTracker(spec) as tracker:
        tracker.metrics(tracker.run("a", "a"), {"loss": 1.0})
        assert mlflow.active_run() is None
    assert isinstance(connect(spec.uri), MlflowClient)

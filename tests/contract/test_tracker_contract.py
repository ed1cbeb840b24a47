"""What the contract of a tracker promises, read back from MLflow."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rayft.errors import TrackingError
from rayft.tracking import Tracker, TrackerSpec
from rayft.tracking.base import Former
from rayft.tracking.connection import connect
from rayft.tracking.mlflow import MlflowTracker


@dataclass
class Seen:
    """A run as it can be read back."""

    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]
    artifacts: set[str]
    status: str | None


@dataclass
class Setup:
    tracker: Tracker
    read: Callable[[str], Seen]


@pytest.fixture
def setup(spec: TrackerSpec) -> Setup:
    tracker, client = MlflowTracker(spec), connect(spec.uri)
    statuses = {"RUNNING": None, "FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}

    def files(run_id: str, folder: str | None = None) -> Iterator[str]:
        for entry in client.list_artifacts(run_id, folder):
            yield from files(run_id, entry.path) if entry.is_dir else (entry.path,)

    def read(run_id: str) -> Seen:
        assert tracker.close().pending == 0
        run = client.get_run(run_id)
        metrics = {
            name: sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
            for name in run.data.metrics
        }
        return Seen(run.data.tags, run.data.params, metrics, set(files(run_id)), statuses[run.info.status])

    return Setup(tracker, read)


def test_what_is_written_can_be_read(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "adapter" / "deep").mkdir(parents=True)
    (tmp_path / "adapter" / "a.json").write_text("{}")
    (tmp_path / "adapter" / "deep" / "b.json").write_text("{}")
    tracker = setup.tracker
    run_id = tracker.run("trial", "t0", tags={"method": "cla"})
    tracker.params(run_id, {"method.rank": "8"})
    tracker.metrics(run_id, {"loss": 2.0, "rate": 1e-3}, 1)
    tracker.metrics(run_id, {"loss": 1.0}, 2)
    tracker.artifact(run_id, tmp_path / "adapter", "adapter")
    tracker.artifact(run_id, tmp_path / "adapter" / "a.json")
    tracker.finish(run_id)
    seen = setup.read(run_id)
    assert seen.tags["method"] == "cla"
    assert seen.params == {"method.rank": "8"}
    assert seen.metrics == {"loss": [(1, 2.0), (2, 1.0)], "rate": [(1, 1e-3)]}
    assert seen.artifacts == {"adapter/a.json", "adapter/deep/b.json", "a.json"}
    assert seen.status == "finished"


def test_a_key_is_one_run_and_a_run_that_goes_on_runs_again(setup: Setup) -> None:
    tracker = setup.tracker
    run_id = tracker.run("trial", "t0")
    tracker.metrics(run_id, {"loss": 2.0}, 1)
    tracker.finish(run_id, "failed")
    assert setup.read(run_id).status == "failed"
    assert tracker.run("trial", "t0", tags={"attempt": "2"}) == run_id
    assert setup.read(run_id).status is None
    tracker.metrics(run_id, {"loss": 1.0}, 2)
    seen = setup.read(run_id)
    assert seen.metrics == {"loss": [(1, 2.0), (2, 1.0)]}
    assert seen.tags["attempt"] == "2"
    assert tracker.run("other", "t1") != run_id


def test_a_run_is_found_by_its_former_key_under_the_same_parent(setup: Setup) -> None:
    tracker = setup.tracker
    parent, other = tracker.run("sweep", "s0"), tracker.run("sweep", "s1")
    run_id = tracker.run("trial", "old", parent=parent)
    assert tracker.run("trial", "elsewhere", parent=other, former=Former("old")) != run_id
    assert tracker.run("trial", "new", parent=parent, former=Former("old")) == run_id
    assert tracker.run("trial", "new", parent=parent) == run_id
    assert tracker.run("trial", "newer", parent=parent, former=Former("old")) != run_id, "it has a new key"


def test_a_run_is_found_by_its_former_key_and_its_params(setup: Setup) -> None:
    tracker = setup.tracker
    run_id = tracker.run("sweep", "old")
    tracker.params(run_id, {"data_digest": "a"})
    setup.read(run_id)
    assert tracker.run("sweep", "one", former=Former("old", {"data_digest": "b"})) != run_id
    assert tracker.run("sweep", "two", former=Former("old", {"data_digest": "a"})) == run_id


def test_the_first_value_of_a_param_stays(setup: Setup) -> None:
    run_id = setup.tracker.run("trial", "t0")
    setup.tracker.params(run_id, {"rank": "8"})
    setup.tracker.params(run_id, {"rank": "16", "alpha": "32"})
    assert setup.read(run_id).params == {"rank": "8", "alpha": "32"}


def test_nan_is_a_number_that_is_kept(setup: Setup) -> None:
    run_id = setup.tracker.run("trial", "t0")
    setup.tracker.metrics(run_id, {"loss": float("nan")}, 3)
    ((step, value),) = setup.read(run_id).metrics["loss"]
    assert step == 3
    assert math.isnan(value)


def test_an_artifact_that_is_not_there_is_an_error(setup: Setup, tmp_path: Path) -> None:
    run_id = setup.tracker.run("trial", "t0")
    with pytest.raises(TrackingError, match="write it first"):
        setup.tracker.artifact(run_id, tmp_path / "none")

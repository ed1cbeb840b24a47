"""Jobs carry requests to lanes and results back, and results keep their format on disk."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from rayft.errors import DiskFullError
from rayft.identity import Identity
from rayft.sweep.jobs import Event, Job, Outcome
from rayft.sweep.request import TrainRequest
from rayft.sweep.result import TrialResult, read_result, trial_folder, write_result
from rayft.sweep.score import ScoreRequest
from rayft.train.run import RunConfig
from rayft.train.trainer import TrainResult


@pytest.fixture
def run() -> RunConfig:
    return RunConfig.model_validate({"data": {"name": "needle_haystack", "train": 8, "val": 2, "test": 2}})


def test_a_request_arrives_in_the_lane_as_it_was(run: RunConfig) -> None:
    train, score = TrainRequest("key", "name", run, "/out", (2, 4)), ScoreRequest(run, ("val",))
    for request, resumable in ((train, True), (score, False)):
        job = Job.of("id", request)
        assert job.request == request
        assert (job.kind, job.resumable) == (request.kind, resumable)


def test_a_job_ends_with_its_result_or_an_error(run: RunConfig) -> None:
    job = Job.of("id", ScoreRequest(run, ("val",)))
    scores = {"val": [1.0, 0.0]}
    assert job.outcome(Event("final", payload=pickle.dumps(scores))) == Outcome(scores)
    assert job.outcome(Event("failed", error="it crashed")) == Outcome(error="it crashed")
    assert job.outcome(Event("interrupted")) == Outcome(error="it was interrupted")
    with pytest.raises(DiskFullError, match="no space"):
        job.outcome(Event("failed", error="no space", fatal="disk"))


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = trial_folder(tmp_path, "key")
    result = TrainResult(
        finished=True, steps=2, val_loss=1.5, val_curve=[(1, 2.0), (2, 1.5)], train_curve=[(1, 2.5)],
        seconds={"train": 1.0}, folder=str(folder / "adapter"), content_hash="c0ffee",
    )  # fmt: skip
    left = TrialResult(result, "run", Identity(data="d" * 16), {})
    write_result(folder, left)
    assert read_result(tmp_path, "key") == left
    values = json.loads((folder / "result.json").read_text())
    assert [*values] == ["result", "run_id", "identity"]
    assert values["result"]["val_curve"] == [[1, 2.0], [2, 1.5]]
    # The sweep's folder may be moved.
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    found = read_result(moved, "key")
    assert found is not None
    assert found.result.folder == str(trial_folder(moved, "key") / "adapter")

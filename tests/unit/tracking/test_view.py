"""MLflow's UI shows a sweep's trials as a table, best first, and the data that each run used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayft.tracking import TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.connection import connect
from rayft.tracking.mlflow import MlflowTracker, flush_spool, prepare
from rayft.tracking.view import VIEW_TAG, place
from tests.integration.browser import browser, chromium
from tests.mlflow_server import MlflowServer

PARTS = {"train": ("aaaa", 64), "val": ("bbbb", 8), "test": ("cccc", 8)}


def track(spec: TrackerSpec) -> str:
    """Track a sweep of three trials, and return the id of its run."""
    with MlflowTracker(spec) as tracker:
        sweep = tracker.run("mine", "mine")
        tracker.view(sweep, "mine")
        for name, score in (("poor", 0.1), ("best", 0.9), ("fair", 0.5)):
            trial = tracker.run(name, name, parent=sweep)
            tracker.params(trial, {"method.name": "lora", "method.rank": "8"})
            tracker.metrics(trial, {"test_score": score})
            tracker.data(trial, "sums.jsonl", "jsonl", PARTS)
            tracker.finish(trial)
        tracker.finish(sweep)
    assert flush_spool(spec).rejected == 0
    return sweep


def test_a_view_is_kept_once_and_not_reset(spec: TrackerSpec) -> None:
    sweep, client = track(spec), connect(spec.uri)
    tag = VIEW_TAG + sweep
    found = json.loads(client.get_experiment(spec.experiment_id).tags[tag])
    assert found["name"] == "mine"
    state = json.loads(found["state"])
    assert state["searchFilter"] == f"tags.`mlflow.parentRunId` = '{sweep}'"
    client.set_experiment_tag(spec.experiment_id, tag, "changed by a user")
    track(spec)
    assert client.get_experiment(spec.experiment_id).tags[tag] == "changed by a user"


def test_the_parts_of_the_data_are_recorded_once(spec: TrackerSpec) -> None:
    sweep = track(spec)
    track(spec)
    client = connect(spec.uri)
    trials = client.search_runs([spec.experiment_id], f"tags.`mlflow.parentRunId` = '{sweep}'")
    assert len(trials) == 3
    for trial in trials:
        found = {
            entry.tags[0].value: (entry.dataset.name, entry.dataset.digest, json.loads(entry.dataset.profile))
            for entry in trial.inputs.dataset_inputs
        }
        assert len(trial.inputs.dataset_inputs) == 3
        assert found["training"] == ("sums.jsonl", "aaaa", {"num_rows": 64})
        assert {*found} == {"training", "validation", "test"}


@pytest.mark.slow
def test_the_link_opens_the_trials_best_first(server: MlflowServer, tmp_path: Path) -> None:
    binary = chromium()
    if binary is None:
        pytest.skip("needs Chromium")
    spec = prepare(tracker_spec(TrackingConfig(uri=server.uri, experiment="seen"), tmp_path / "out"))
    sweep = track(spec)
    with browser(binary, tmp_path / "profile") as page:
        page.open(f"{server.uri}/{place(spec.experiment_id, sweep)}")
        page.wait("document.body.innerText.includes('3 matching runs')")
        page.wait("['best', 'fair', 'poor'].every(name => document.body.innerText.includes(name))")
        text = page.run("document.body.innerText")
    assert text.index("best") < text.index("fair") < text.index("poor")
    assert "test_score" in text
    assert "Error loading" not in text

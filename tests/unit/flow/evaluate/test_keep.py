"""Evaluations in the report of the sweep that the adapters belong to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rayft.cli import app
from rayft.flow.config import load_config
from rayft.flow.evaluate.request import EvaluateRequest
from rayft.flow.evaluate.run import evaluate
from rayft.flow.hold import hold
from rayft.flow.sweep.folder import clear_folder
from rayft.registry.store import MlflowRegistry
from rayft.report.evaluations import SavedEvaluations
from rayft.report.text import difference_text, score_text
from rayft.tracking import TrackerSpec
from rayft.tracking.mlflow import MlflowTracker
from tests.unit.flow.evaluate.conftest import Here
from tests.unit.report.example import example


@pytest.fixture
def sweep(here: Here, monkeypatch: pytest.MonkeyPatch, spec: TrackerSpec) -> Path:
    """Return the folder of a sweep that has ended, without its report."""
    monkeypatch.setattr("rayft.report.render.sweep_figures", lambda _: [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", spec.uri)
    output = here.sweep()
    here.save("out/winner", here.adapter("winner"))
    example().save(output / "sweep.json")
    return output


def said(*targets: str, **options: Any) -> list[str]:
    """Evaluate, and return what is said."""
    found: list[str] = []
    evaluate(EvaluateRequest(targets, **{"samples": 5, **options}), found.append)
    return found


def test_scores_and_differences_are_in_the_report_once(here: Here, sweep: Path) -> None:
    request = EvaluateRequest(("out", "base"), samples=5)
    found = evaluate(request)
    assert evaluate(request) == found
    (saved,) = SavedEvaluations.find(sweep).found
    assert saved.data_digest == found.data
    page = (sweep / "report.html").read_text()
    for target in found.targets:
        assert score_text(target.measures[0].score) in page
        assert f"{target.loss:.3f}" in page
    assert saved.differences[0].difference.n == 5
    assert difference_text(saved.differences[0].difference) in page
    assert f"base {here.model} · first questions 5 · on other data" in page
    # Of other settings, it is another evaluation.
    assert said("out", samples=4) == [f"in the report of the sweep, too: {sweep / 'report.html'}"]
    assert len(SavedEvaluations.find(sweep).found) == 2
    # A report that is made again has them, and a damaged one is named.
    (sweep / "evaluations" / "damaged.json").write_text("{")
    shown = CliRunner().invoke(app, ["report", str(sweep), "-o", "again.html"])
    assert shown.exit_code == 0, shown.output
    page = Path("again.html").read_text()
    assert page.count("first questions") == 3
    assert "evaluations/damaged.json" in page
    # They belong to what a sweep that starts afresh deletes.
    clear_folder(sweep)
    assert [*sweep.iterdir()] == []


def test_a_registered_adapter_belongs_to_the_sweep_that_has_trained_it(
    here: Here, sweep: Path, spec: TrackerSpec
) -> None:
    adapter = here.adapter("winner")
    with MlflowTracker(spec) as tracker:
        run = tracker.run("trial", "trial")
        tracker.params(run, {"adapter_hash": adapter.content_hash})
        tracker.finish(run)
    registry = MlflowRegistry(spec.uri)
    registry.alias("answers", "champion", registry.register("answers", run, sweep / "winner", {}))
    ask: dict[str, Any] = {"config": "config.yaml", "uri": spec.uri}
    said("models:/answers@champion", **ask)
    assert SavedEvaluations.find(sweep).found == ()
    record = example()
    trials = (record.trials[0].model_copy(update={"run_id": run}), *record.trials[1:])
    record.model_copy(update={"trials": trials}).save(sweep / "sweep.json")
    said("models:/answers@champion", **ask)
    said(here.save("elsewhere", here.adapter("other")), **ask)
    (saved,) = SavedEvaluations.find(sweep).found
    assert saved.scores[0].target == "models:/answers@champion"
    assert load_config("config.yaml").folder.resolve() == sweep.resolve()


def test_scores_are_given_even_if_the_report_cannot_be_made(here: Here, sweep: Path) -> None:
    with hold(sweep, "--output"):
        (text,) = said("out")
    assert "is in use: its report has" in text
    assert not (sweep / "report.html").exists()
    (sweep / "report.html").write_text("mine")
    (text,) = said("out")
    assert "was not written by rayft" in text
    assert (sweep / "report.html").read_text() == "mine"
    shutil.rmtree(sweep / "evaluations")
    (sweep / "evaluations").write_text("mine")
    (text,) = said("out")
    assert text.startswith("not in ")

"""A sweep that analyses its adapters, and `rayft analyze` of a tracked run of it."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from rayft.analysis.record import SweepAnalysis
from rayft.errors import ReportError, TrackingError
from rayft.flow import commands
from rayft.flow.analyze.run import analyze_target
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.display import Display
from rayft.report.record import SweepRecord
from tests.e2e.small import small_config

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.usefixtures("in_warm_workers")]

QUIET = Display(Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    folder = tmp_path_factory.mktemp("analyze")
    small_config(folder, {"lora": {"ranks": [2, 4], "lr": [1e-2]}, "cla": {"ranks": [4], "lr": [1e-2]}})
    parts = "[gap, bounds, spectra, sharpness, line, landscape, trajectory]"
    sizes = ["analyze.samples=4", "analyze.examples=2", "analyze.grid=3", "analyze.intruder_modules=2"]
    trail = ["evaluate.every=1", "evaluate.trail=true", "squeeze.ranks=[1]"]
    return load_config(folder / "small.yaml", [f"analyze.parts={parts}", *sizes, *trail])


def test_the_sweep_analyses_tracks_and_reports(record: SweepRecord, config: PipelineConfig) -> None:
    output = Path(config.output)
    found = SweepAnalysis.find(output)
    assert found
    assert [one.name for one in found.adapters] == [trial.id for trial in record.trials]
    assert all(not one.notes for one in found.adapters), [one.notes for one in found.adapters]
    assert {one.measure for one in found.predictors} >= {"update_norm", "sam_sharpness"}
    assert all(one.n == 3 for one in found.predictors)
    assert "sample_train_loss" not in {one.measure for one in found.predictors}, "a part of the gap"
    page = (output / "report.html").read_text()
    assert "Loss landscapes" in page
    assert "Landscapes of the trajectories" in page
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    for trial, one in zip(record.trials, found.adapters, strict=True):
        metrics = client.get_run(trial.run_id).data.metrics
        assert metrics["analysis/gap"] == pytest.approx(one.measures["gap"])
        assert {item.path for item in client.list_artifacts(trial.run_id, "analysis")} == {
            "analysis/analysis.json", "analysis/line-line.png", "analysis/line-update.png",
            "analysis/landscape-random.png", "analysis/landscape-trajectory.png",
            "analysis/surface-random.png", "analysis/surface-trajectory.png",
        }  # fmt: skip


def test_a_tracked_run_is_analysed_from_the_trackers_files(
    record: SweepRecord, config: PipelineConfig, tmp_path: Path
) -> None:
    uri = f"sqlite:///{Path(config.output) / 'mlflow.db'}"
    trial = record.trials[0]
    found, folder = analyze_target(
        trial.run_id, QUIET, parts=["spectra,gap", "hessian"],
        overrides=["samples=4", "intruder_modules=1", "examples=1", "eigenvalues=1"],
        out=tmp_path, uri=uri,
    )  # fmt: skip
    whole = SweepAnalysis.find(Path(config.output))
    assert whole
    one = found.adapters[0]
    (before,) = (other for other in whole.adapters if other.name == trial.id)
    assert one.measures["update_norm"] == pytest.approx(before.measures["update_norm"])
    assert one.gap == before.gap, "the same examples for the same seed"
    assert math.isfinite(one.measures["effective_rank_mean"])
    assert math.isfinite(one.measures["hessian_trace"])
    assert "3 or more finished runs with a gap, and there are 1" in found.note
    assert (folder / "analysis.json").is_file()


def test_a_target_that_cant_be_analysed_is_refused_with_a_hint(
    record: SweepRecord, config: PipelineConfig, tmp_path: Path
) -> None:
    uri = f"sqlite:///{Path(config.output) / 'mlflow.db'}"
    client = MlflowClient(uri)
    sweep = client.get_run(record.trials[0].run_id).data.tags["mlflow.parentRunId"]
    with pytest.raises(ReportError, match=r"has stored no adapter.*give the run of a trial"):
        analyze_target(sweep, QUIET, uri=uri)
    with pytest.raises(TrackingError, match=r"no run 0{32} can be read"):
        analyze_target("0" * 32, QUIET, uri=uri)
    with pytest.raises(ReportError, match="neither a folder nor a run id; give a sweep's output folder"):
        commands.analyze(str(tmp_path / "nowhere"), Console(file=io.StringIO()))

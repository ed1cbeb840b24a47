"""The report and serve.yaml are written first; a later failure is reported, and left to the next run.

On a cluster of several nodes serve.yaml names versions of the registry, and is written after registering.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ray.serve.schema import ServeDeploySchema
from rich.console import Console

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.config import load, parse
from rayft.errors import DiskFullError, RegistryError, TrainError, UnfinishedError
from rayft.flow.config import load_config
from rayft.flow.demo import served_names
from rayft.flow.display import Display
from rayft.flow.scoring import Measured
from rayft.flow.squeeze.make import Source, SqueezedAdapter
from rayft.flow.sweep import publish as module
from rayft.flow.sweep.preflight import Plan, preflight
from rayft.flow.sweep.publish import Publisher, check_complete
from rayft.flow.sweep.record import Findings
from rayft.flow.sweep.tracking import SweepTracking
from rayft.methods.base import LoraFactors
from rayft.registry.store import MlflowRegistry
from rayft.report.record import SweepRecord
from rayft.serving.config import ServeConfig
from rayft.sweep.request import tracking_key
from rayft.sweep.search import Trial
from rayft.tracking import TrackerSpec
from rayft.tracking.connection import connect
from rayft.tracking.mlflow import MlflowTracker, flush_spool
from rayft.train.trainer import TrainResult


@pytest.fixture(scope="module")
def checked(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    folder = tmp_path_factory.mktemp("checked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_CACHE", str(models))
        # The default: a database in the sweep's folder, whose tables are made.
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield preflight(load_config("tiny", [f"output={folder / 'out'}"]))


def saved(folder: Path, seed: int) -> AdapterArtifact:
    generator = torch.Generator().manual_seed(seed)
    factors = LoraFactors(torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator), 2.0)
    AdapterArtifact({"layers.0.q": factors}, meta=ArtifactMeta(method="lora")).save(folder)
    return AdapterArtifact.load(folder)


@dataclass
class Sweep:
    """A sweep whose stages are done except publishing: one trial has finished, the lane of another died."""

    plan: Plan
    found: Findings
    said: io.StringIO
    display: Display = field(default_factory=Display)

    def report(self) -> SweepRecord:
        self.said.truncate(0)
        self.said.seek(0)
        with MlflowTracker(self.plan.tracker, interval=0.05) as tracker:
            tracking = SweepTracking(self.plan, tracker)
            self.found.trials = tracking.with_runs(self.found.trials)
            self.found.winner = self.found.trials[0]
            self.display = Display(Console(file=self.said, width=1000))
            record = Publisher(self.plan, self.display, tracking).publish(self.found)
        flush_spool(self.plan.tracker)
        return record

    @property
    def runs(self) -> dict[str, Any]:
        client = connect(self.plan.tracker.uri)
        return {run.info.run_name: run for run in client.search_runs([self.plan.tracker.experiment_id])}

    @property
    def points(self) -> dict[tuple[str, str], list[tuple[int, float]]]:
        client = connect(self.plan.tracker.uri)
        return {
            (name, metric): [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, metric)]
            for name, run in self.runs.items()
            for metric in run.data.metrics
        }


@pytest.fixture
def sweep(checked: Plan, spec: TrackerSpec, tmp_path: Path) -> Sweep:
    output = tmp_path / "out"
    plan = replace(checked, output=output, tracker=spec, points=checked.points[:2])
    best, lost = plan.points
    artifact = saved(output / "trials" / best.key / "adapter", 0)
    result = TrainResult(
        finished=True, steps=3, rank=2, val_curve=[(3, 1.0)], train_curve=[(1, 2.0)],
        val_loss=1.0, trainable=10, bytes=20, peak_memory=30,
        seconds={"train": 1.0, "evaluate": 0.5, "overhead": 0.1},
        folder=str(output / "trials" / best.key / "adapter"), content_hash=artifact.content_hash,
    )  # fmt: skip
    with MlflowTracker(spec) as tracker:
        for point in plan.points:
            tracker.run(point.name, tracking_key(point.key, plan.identity))
        # Its lane began it while MLflow was away.
        trials = [
            Trial(best, result, "key:" + tracking_key(best.key, plan.identity)),
            Trial(lost, error="killed"),
        ]
    measured = Measured({"val": [1.0, 1.0], "test": [1.0, 0.0]})
    found = Findings(
        baselines={"base": Measured({"val": [0.0, 0.0], "test": [0.0, 0.0]})},
        trials=trials,
        scores={best.name: measured},
        full=saved(output / "winner", 0),
    )
    return Sweep(plan, found, io.StringIO())


def test_a_trial_that_began_while_mlflow_was_away_is_registered_with_its_run(sweep: Sweep) -> None:
    record = sweep.report()
    name, lost = (point.name for point in sweep.plan.points)
    runs = sweep.runs
    assert [trial.run_id for trial in record.trials] == [runs[name].info.run_id, runs[lost].info.run_id]
    assert SweepRecord.load(sweep.plan.output) == record
    (version,) = MlflowRegistry(sweep.plan.tracker.uri).versions(sweep.plan.config.name)
    assert version.run_id == runs[name].info.run_id
    assert version.aliases == ("champion",)
    assert runs[lost].info.status == "FAILED", "its lane could not say so"


def test_publishing_again_tracks_no_point_twice(sweep: Sweep) -> None:
    sweep.report()
    before, ended = sweep.points, sweep.runs["base"].info.end_time
    record = sweep.report()
    assert sweep.points == before
    assert {len(points) for points in before.values()} == {1}
    assert sweep.runs["base"].info.end_time == ended
    assert [version.number for version in MlflowRegistry(sweep.plan.tracker.uri).versions(record.name)] == [1]


def fail(error: Exception) -> Any:
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


@pytest.mark.parametrize(
    ("where", "what", "expected"),
    [
        ("publish.MlflowRegistry.register", "register", "not registered: MLflow refuses"),
        ("publish.promote", "promote", "registered as tiny version 1, not promoted: MLflow refuses"),
        ("publish.render", "report", "the report was not drawn: RuntimeError: no font"),
        ("tracking.score_metrics", "scores", "not all that was found is tracked: RuntimeError: no font"),
        ("publish.yaml_text", "serve.yaml", "serve.yaml was not written: RuntimeError: no font"),
    ],
)
def test_a_late_failure_costs_nothing_else_and_the_next_run_repairs_it(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, where: str, what: str, expected: str
) -> None:
    error = RegistryError("MLflow refuses") if "MLflow refuses" in expected else RuntimeError("no\nfont")
    with monkeypatch.context() as patch:
        patch.setattr(f"rayft.flow.sweep.{where}", fail(error))
        record = sweep.report()
    output, name = sweep.plan.output, sweep.plan.config.name
    with pytest.raises(UnfinishedError, match=expected.partition(":")[0]):
        check_complete(record, sweep.display.undone)
    (line,) = [line for line in sweep.said.getvalue().splitlines() if "run the sweep again" in line]
    assert expected.replace("\n", " ") in line
    assert f"Everything else is in {output}" in line
    assert SweepRecord.load(output) == record

    def there() -> dict[str, bool]:
        client = connect(sweep.plan.tracker.uri)
        models = client.search_registered_models(f"name='{name}'")
        return {
            "report": (output / "report.html").is_file(),
            "serve.yaml": (output / "serve.yaml").is_file(),
            "scores": "test_score" in sweep.runs[sweep.plan.points[0].name].data.metrics,
            "register": bool(client.search_model_versions(f"name='{name}'")),
            "promote": any(model.aliases for model in models),
        }

    lacking = {"register": {"register", "promote"}}.get(what, {what})
    assert {one for one, is_there in there().items() if not is_there} == lacking
    record = sweep.report()
    assert all(there().values())
    assert "run the sweep again" not in sweep.said.getvalue()
    check_complete(record, sweep.display.undone)


def test_a_sweep_whose_trials_have_all_failed_ends_with_an_error(sweep: Sweep) -> None:
    record = sweep.report()
    lost = [trial for trial in record.trials if trial.status == "failed"]
    assert lost
    with pytest.raises(TrainError, match="every trial has failed"):
        check_complete(record.model_copy(update={"trials": tuple(lost)}), sweep.display.undone)


def test_everything_else_is_written_while_mlflow_is_away(sweep: Sweep) -> None:
    database = Path(sweep.plan.tracker.uri.removeprefix("sqlite:///"))
    database.rename(database.with_suffix(".away"))
    record = sweep.report()
    assert "not registered: MLflow does not have the run of" in sweep.said.getvalue()
    assert record.trials[0].run_id.startswith("key:")
    page = (sweep.plan.output / "report.html").read_text()
    assert "not in MLflow yet" in page
    assert "key:" not in page
    serve = yaml.safe_load((sweep.plan.output / "serve.yaml").read_text())
    assert serve["adapters"] == {sweep.plan.config.name: str(sweep.plan.output / "winner")}
    database.with_suffix(".away").rename(database)
    record = sweep.report()
    assert record.trials[0].run_id == sweep.runs[record.trials[0].id].info.run_id
    assert record.trials[0].run_id in (sweep.plan.output / "report.html").read_text()
    assert {len(points) for points in sweep.points.values()} == {1}
    assert MlflowRegistry(sweep.plan.tracker.uri).resolve(f"models:/{record.name}@champion").version == 1


def test_a_full_disk_ends_the_command(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayft.flow.sweep.publish.render", fail(OSError(28, "No space left on device")))
    with pytest.raises(DiskFullError, match="run the same command again"):
        sweep.report()
    assert (sweep.plan.output / "serve.yaml").is_file()


def test_sweeps_of_one_configuration_on_one_server_have_runs_of_their_own(sweep: Sweep) -> None:
    keys = set()
    for one in ("5eed", "fe11", ""):
        identity = sweep.plan.identity.model_copy(update={"sweep": one})
        plan = replace(sweep.plan, identity=identity)
        with MlflowTracker(sweep.plan.tracker) as tracker:
            keys |= {SweepTracking(plan, tracker).key, tracking_key("t0", identity)}
    assert len(keys) == 6
    with MlflowTracker(sweep.plan.tracker) as tracker:
        parents = {
            SweepTracking(
                replace(sweep.plan, identity=sweep.plan.identity.model_copy(update={"sweep": one})), tracker
            ).run_id
            for one in ("5eed", "fe11", "5eed")
        }
    assert len(parents) == 2


@pytest.fixture
def on_cluster(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """The sweep on several nodes, with both trials finished."""
    monkeypatch.setattr(module, "on_several_nodes", lambda: True)
    best, other = sweep.plan.points
    assert (best.run.method.name, other.run.method.name) == ("lora", "cla")
    folder = sweep.plan.output / "trials" / other.key / "adapter"
    content = saved(folder, 1).content_hash
    winner = sweep.found.trials[0].result
    assert winner is not None
    result = replace(winner, folder=str(folder), val_loss=1.5, content_hash=content)
    sweep.found.trials[1] = Trial(other, result, "key:" + tracking_key(other.key, sweep.plan.identity))
    sweep.found.scores[other.name] = Measured({"val": [1.0, 0.0], "test": [1.0, 1.0]})
    return sweep


def served(sweep: Sweep) -> dict[str, str]:
    """Check both files that serve the result, and return the adapters in them."""
    serve = load(ServeConfig, sweep.plan.output / "serve.yaml")
    deploy = ServeDeploySchema.model_validate(yaml.safe_load((sweep.plan.output / "deploy.yaml").read_text()))
    (application,) = deploy.applications
    assert parse(ServeConfig, application.args) == serve
    assert serve.port == sweep.plan.config.serve.port
    assert deploy.proxy_location == "Disabled"
    assert serve.registry == sweep.plan.tracker.uri
    assert serve.fetched == str(Path.home() / "rayft-runs/serving/adapters")
    return dict(serve.adapters)


def test_on_a_cluster_the_registry_has_all_that_is_served(on_cluster: Sweep) -> None:
    sweep, name = on_cluster, on_cluster.plan.config.name
    record = sweep.report()
    expected = {name: f"models:/{name}/1", f"{name}-cla": f"models:/{name}-cla/1"}
    assert served(sweep) == expected
    registry = MlflowRegistry(sweep.plan.tracker.uri)
    (version,) = registry.versions(f"{name}-cla")
    trial = next(trial for trial in record.trials if trial.method == "cla")
    assert (version.run_id, version.aliases, version.score()) == (trial.run_id, (), 0.5)
    assert version.content_hash == AdapterArtifact.load(trial.folder).content_hash
    assert registry.versions(name)[0].aliases == ("champion",)
    assert served_names(sweep.plan.output, record) == ["base", name, f"{name}-cla"]
    # The same command again finds the versions.
    sweep.report()
    assert served(sweep) == expected
    assert [len(registry.versions(model)) for model in expected] == [1, 1]


def test_what_can_not_be_registered_on_a_cluster_is_left_out_and_reported(
    on_cluster: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, name = on_cluster, on_cluster.plan.config.name
    register = MlflowRegistry.register
    for refused in (name, f"{name}-cla"):

        def only(registry: MlflowRegistry, model: str, *rest: Any, refused: str = refused) -> int:
            if model == refused:
                raise RegistryError("MLflow refuses")
            return register(registry, model, *rest)

        (sweep.plan.output / "serve.yaml").unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(MlflowRegistry, "register", only)
            record = sweep.report()
        with pytest.raises(UnfinishedError, match=f"serve.yaml leaves out {refused}"):
            check_complete(record, sweep.display.undone)
        assert f"serve.yaml leaves out {refused}: " in sweep.said.getvalue()
        left = {model: f"models:/{model}/1" for model in (name, f"{name}-cla") if model != refused}
        assert served(sweep) == left
        assert served_names(sweep.plan.output, record, among=left) == ["base", *left]
    record = sweep.report()
    check_complete(record, sweep.display.undone)
    assert len(served(sweep)) == 2


def test_a_cluster_gets_no_serving_configuration_if_nothing_can_be_registered(
    on_cluster: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MlflowRegistry, "register", fail(RuntimeError("no\nfont")))
    sweep = on_cluster
    record = sweep.report()
    with pytest.raises(UnfinishedError, match="not registered"):
        check_complete(record, sweep.display.undone)
    assert not (sweep.plan.output / "serve.yaml").exists()


def test_if_a_further_trained_adapter_ships_the_winner_gets_its_own_name(on_cluster: Sweep) -> None:
    sweep, name = on_cluster, on_cluster.plan.config.name
    best = sweep.plan.points[0]
    full = saved(sweep.plan.output / "winner", 3)
    smaller = saved(sweep.plan.output / "squeezed" / "r1+cont", 2)
    item = SqueezedAdapter(
        name=f"{best.name}@r1+2", source=Source(best.name, best.key, best.run, identity=sweep.plan.identity),
        how="cont", rank=1, folder=sweep.plan.output / "squeezed" / "r1+cont", parameters=5, bytes=20,
        energy={"layers.0.q": 0.5}, seconds=1.0,
    )  # fmt: skip
    sweep.found.squeezed = [item]
    sweep.found.scores[item.name] = Measured({"val": [1.0, 1.0], "test": [1.0, 1.0]})
    record = sweep.report()
    assert record.winner
    assert record.winner.ship == item.name
    assert served(sweep) == {
        name: f"models:/{name}-lora/1", f"{name}-r1-cont2": f"models:/{name}/1",
        f"{name}-cla": f"models:/{name}-cla/1",
    }  # fmt: skip
    registry = MlflowRegistry(sweep.plan.tracker.uri)
    assert registry.versions(name)[0].content_hash == smaller.content_hash
    assert registry.versions(f"{name}-lora")[0].content_hash == full.content_hash

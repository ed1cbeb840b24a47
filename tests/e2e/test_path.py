"""The demo on the tiny model: sweep, squeeze, register, report, serve, ask; then the sweep continues."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console
from transformers import AutoModelForCausalLM

from rayft.artifacts import AdapterArtifact
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.demo import run_demo
from rayft.flow.display import Display
from rayft.flow.sweep import run as flow
from rayft.flow.sweep.run import run_sweep
from rayft.models.inject import attach
from rayft.models.load import ModelConfig, load_model
from rayft.numerics import assert_close
from rayft.report.record import SweepRecord
from tests.e2e.warm import WarmWorkers

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    output = tmp_path_factory.mktemp("e2e") / "tiny"
    squeezes = ["squeeze.winners=2", "squeeze.budget=10kB", "squeeze.cont={steps: 2, lr: 1e-3}"]
    return load_config("tiny", [f"output={output}", "serve.port=8123", "analyze.parts=[spectra]", *squeezes])


@pytest.fixture(scope="module")
def record(local_ray: None, config: PipelineConfig) -> SweepRecord:
    return run_demo(config, Display(Console(quiet=True)))


def squeezed(record: SweepRecord) -> list[tuple[str, str, str]]:
    return [(item.trial, item.how, item.name.rpartition("@")[2]) for item in record.squeezed]


def test_every_stage_leaves_its_result(record: SweepRecord, config: PipelineConfig) -> None:
    output = Path(config.output)
    assert [base.name for base in record.baselines] == ["base", "answer only", "few shot", "majority answer"]
    assert len(record.trials) == 3
    assert record.winner
    assert {trial for trial, _, _ in squeezed(record)} == {
        t.id for t in record.trials if t.status == "finished"
    }
    made = {(how, label) for trial, how, label in squeezed(record) if trial == record.winner.trial}
    assert made == {("post", label) for label in ("r2", "r1", "b10kB")} | {
        ("cont", f"{label}+2") for label in ("r2", "r1", "b10kB")
    }
    assert SweepRecord.load(output) == record
    assert "<svg" in (output / "report.html").read_text()
    winner = AdapterArtifact.load(output / "winner")
    assert winner.squeezed
    assert set(record.singular_values) == set(winner.modules)


def test_the_server_answers_for_the_base_and_three_ranks(record: SweepRecord) -> None:
    assert record.served
    assert len(record.served.exchanges) == 3
    for exchange in record.served.exchanges:
        assert list(exchange.answers)[:4] == ["base", "tiny", "tiny@r2", "tiny@r1"]
        assert exchange.expected in exchange.question


def test_peft_loads_every_adapter_and_gives_the_same_logits(
    record: SweepRecord, config: PipelineConfig
) -> None:
    loaded = load_model(ModelConfig(name="tiny-llama"), torch.float32)
    folder = loaded.model.config._name_or_path
    ids = torch.arange(2, 40).unsqueeze(0)
    adapters = [trial.folder for trial in record.trials] + [item.folder for item in record.squeezed]
    for adapter in adapters:
        attach(loaded.model, AdapterArtifact.load(adapter))
        with torch.no_grad():
            ours = loaded.model(input_ids=ids).logits
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            theirs = peft.PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits
        assert_close(ours, theirs, torch.float32, 64, depth=16)


def runs(config: PipelineConfig) -> list[object]:
    client = MlflowClient(f"sqlite:///{config.output}/mlflow.db")
    experiment = client.get_experiment_by_name("rayft")
    assert experiment
    return list(client.search_runs([experiment.experiment_id]))


def test_every_run_is_tracked_and_the_winner_is_registered(
    record: SweepRecord, config: PipelineConfig
) -> None:
    found = runs(config)
    kinds = sorted(run.data.tags["rayft.kind"] for run in found)  # type: ignore[attr-defined]
    assert kinds == ["baseline"] * 4 + ["squeezed"] * 12 + ["sweep"] + ["trial"] * 3
    for run in found:
        assert run.info.status in ("FINISHED", "KILLED")  # type: ignore[attr-defined]
        if run.data.tags["rayft.kind"] != "sweep":  # type: ignore[attr-defined]
            assert "test_score" in run.data.metrics  # type: ignore[attr-defined]
            assert run.data.params["data_digest"] == record.data_digest  # type: ignore[attr-defined]
    client = MlflowClient(f"sqlite:///{config.output}/mlflow.db")
    assert int(client.get_model_version_by_alias("tiny", "champion").version) == 1


def test_a_squeezed_adapter_is_tracked_as_a_child_of_its_trial(
    record: SweepRecord, config: PipelineConfig
) -> None:
    client = MlflowClient(f"sqlite:///{config.output}/mlflow.db")
    trials = {trial.id: trial for trial in record.trials}
    modules = AdapterArtifact.load(Path(config.output) / "winner").modules
    for run in runs(config):
        tags, metrics = run.data.tags, run.data.metrics  # type: ignore[attr-defined]
        if tags["rayft.kind"] != "squeezed":
            continue
        params = run.data.params  # type: ignore[attr-defined]
        trial = trials[params["squeezed_from"]]
        assert tags["mlflow.parentRunId"] == trial.run_id
        kept = {
            name.removeprefix("retention/"): v for name, v in metrics.items() if name.startswith("retention/")
        }
        assert set(kept) == set(modules)
        assert min(kept.values()) == metrics["retained_energy_min"] < 1
        assert metrics["source_bytes"] == trial.bytes > metrics["adapter_bytes"]
        assert metrics["source_val_score"] == trial.val_score
        files = {file.path for file in client.list_artifacts(run.info.run_id)}  # type: ignore[attr-defined]
        assert files == {"adapter", "spectrum.png"}
        if tags["rayft.how"] == "cont":
            assert params["start"].endswith(params["squeezed_to"].partition("+")[0])
            assert len(client.get_metric_history(run.info.run_id, "train_loss")) == 2  # type: ignore[attr-defined]


def test_an_adapter_that_was_trained_further_differs_from_its_start_and_has_prefixes(
    record: SweepRecord,
) -> None:
    folders = {item.name: Path(item.folder) for item in record.squeezed}
    for item in record.squeezed:
        if item.how == "cont":
            start, after = (AdapterArtifact.load(folders[name]) for name in (item.name[:-2], item.name))
            assert after.squeezed
            assert after.content_hash != start.content_hash
            assert {n: f.rank for n, f in after.modules.items()} == {
                n: f.rank for n, f in start.modules.items()
            }


def test_a_sweep_that_continues_trains_nothing_twice_and_publishes_before_the_analysis(
    record: SweepRecord,
    config: PipelineConfig,
    warm_workers: WarmWorkers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = Path(config.output)
    results = {path: path.stat().st_mtime_ns for path in output.glob("trials/*/result.json")}
    before = len(runs(config))
    # As if the sweep had been killed in the second trial.
    lost = output / "trials" / next(t.name for t in (output / "trials").iterdir() if t.name.startswith("cla"))
    (lost / "result.json").unlink()
    for name in ("sweep.json", "report.html", "serve.yaml"):
        (output / name).unlink()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, "analyze_items", stopped)
    with warm_workers.used(), pytest.raises(KeyboardInterrupt):
        run_sweep(config, Display(Console(quiet=True)))
    again = SweepRecord.load(output)
    assert len(runs(config)) == before
    for path, stamp in results.items():
        assert (path.stat().st_mtime_ns == stamp) == (path.parent != lost)
    for mine, first in zip(again.trials, record.trials, strict=True):
        assert (mine.id, mine.val_loss, mine.test) == (first.id, first.val_loss, first.test)
    assert again.winner
    assert again.winner == record.winner
    assert json.loads((lost / "result.json").read_text())["result"]["finished"]
    assert again.winner.ship in (output / "report.html").read_text()
    assert (output / "serve.yaml").is_file()

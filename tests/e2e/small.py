"""Run sweeps of the tiny model that are as short as possible, and read what they leave."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from rich.console import Console

from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.display import Display
from rayft.flow.sweep.run import run_sweep
from rayft.report.record import SweepRecord
from rayft.sweep.decisions import EVENTS_FILE, EventLog


def small_config(
    folder: Path, methods: Mapping[str, Any], squeeze: Mapping[str, Any] | None = None
) -> PipelineConfig:
    """Write the packaged `tiny` with other methods and four steps to a file, and load that."""
    tiny = load_config("tiny", [f"output={folder / 'out'}"]).model_dump(mode="json")
    tiny["optim"]["steps"] = tiny["sweep"]["grace"] = 4
    tiny["data"] |= {"train": 24, "val": 4, "test": 4}
    tiny["sweep"]["methods"] = dict(methods)
    tiny["squeeze"] |= dict(squeeze or {})
    (folder / "small.yaml").write_text(yaml.safe_dump(tiny))
    return load_config(str(folder / "small.yaml"))


def run(config: PipelineConfig) -> tuple[SweepRecord, str]:
    """Run a sweep; return its record and what it printed."""
    said = io.StringIO()
    return run_sweep(config, Display(Console(file=said, width=1000))), said.getvalue()


def events(folder: Path) -> list[tuple[str, int, float, bool]]:
    """Return the decisions of the search in their order: trial, step, loss, whether the trial goes on."""
    log = EventLog(folder / EVENTS_FILE)
    return [(one.trial, one.step, one.val_loss, one.go_on) for one in log.decisions]


def adapters(folder: Path) -> dict[str, tuple[bool, int, str]]:
    """Return what each trial has left: whether it finished, its last step, the hash of its adapter."""
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("trials/*/result.json")}
    return {
        key: tuple(values["result"][name] for name in ("finished", "steps", "content_hash"))  # type: ignore[misc]
        for key, values in results.items()
    }


def histories(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return the metrics of each tracked trial in MLflow's order, without those that depend on clocks."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "rayft"]
    found = {}
    for one in client.search_runs([experiment.experiment_id], "tags.`rayft.kind` = 'trial'"):
        metrics = [name for name in one.data.metrics if name in ("train_loss", "val_loss", "lr", "grad_norm")]
        assert one.info.run_name not in found, "a trial has two runs"
        found[one.info.run_name] = {
            name: [(item.step, item.value) for item in client.get_metric_history(one.info.run_id, name)]
            for name in metrics
        }
    return found

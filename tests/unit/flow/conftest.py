"""What tests of sweeps share, made once: tiny models, an MLflow database, and a finished sweep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rayft.flow.config import load_config
from rayft.flow.sweep.preflight import Plan, preflight
from rayft.sweep.result import TrialResult, write_result
from rayft.tracking.base import TrackerSpec
from rayft.tracking.mlflow import prepare
from rayft.train.trainer import TrainResult
from tests.unit.flow.answers import CONFIG, adapter, request_of


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the tiny models are saved by the first test that needs them."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of an MLflow database with its tables, whose creation takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    prepare(TrackerSpec(uri, "rayft", folder / "spool"))
    return uri


@pytest.fixture
def prepared(models: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the shared cache and the shared MLflow database."""
    monkeypatch.setenv("RAYFT_CACHE", str(models))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)


@pytest.fixture(scope="session")
def kept(models: Path, server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A sweep's plan whose only trial has finished, and the working directory of the sweep."""
    here = tmp_path_factory.mktemp("sweep")
    rows = [json.dumps({"prompt": f"How many in box {box}?", "completion": "5"}) for box in range(12)]
    (here / "answers.jsonl").write_text("\n".join(rows))
    (here / "answers.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("RAYFT_CACHE", str(models))
        patch.setenv("MLFLOW_TRACKING_URI", server)
        plan = preflight(load_config("answers.yaml"))
    (point,) = plan.points
    folder = plan.output / "trials" / point.key
    saved = adapter()
    saved.save(folder / "adapter")
    result = TrainResult(
        finished=True, steps=2, val_curve=[(2, 1.0)], val_loss=1.0,
        folder=str(folder / "adapter"), content_hash=saved.content_hash,
    )  # fmt: skip
    write_result(folder, TrialResult(result, "r", request_of(plan).identity.brief))
    return plan, here


@pytest.fixture
def plan(kept: tuple[Plan, Path], prepared: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A copy of the finished sweep, which a test may damage; its working directory is the current one."""
    monkeypatch.chdir(shutil.copytree(kept[1], tmp_path / "here"))
    return Plan(**{**vars(kept[0]), "output": tmp_path / "here" / "out"})

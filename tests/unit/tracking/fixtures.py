"""An MLflow database, and a server, for the tests of all layers that write to one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayft.tracking import TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.connection import connect
from rayft.tracking.mlflow import prepare
from tests.unit.tracking.mlflow_server import MlflowServer


@pytest.fixture(autouse=True)
def no_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables: making them takes seconds, a copy none."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    path.touch()
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def spec(tmp_path: Path, migrated: Path) -> TrackerSpec:
    """A prepared sqlite database in the test's folder."""
    (tmp_path / "out").mkdir()
    shutil.copy(migrated, tmp_path / "out" / "mlflow.db")
    return prepare(tracker_spec(TrackingConfig(), tmp_path / "out"))


@pytest.fixture
def server(tmp_path: Path, migrated: Path) -> Iterator[MlflowServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(migrated, folder / "server.db")
    server = MlflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()

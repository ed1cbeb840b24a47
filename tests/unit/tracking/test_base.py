from pathlib import Path

import pytest

from rayft.errors import TrackingError
from rayft.tracking import TrackingConfig, provenance, tracker_spec
from rayft.tracking.base import redacted


def test_uri_of_the_config_wins_then_the_environment_then_sqlite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracker_spec(TrackingConfig(), tmp_path).uri == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert tracker_spec(TrackingConfig(), tmp_path).uri == "http://there:5000"
    assert tracker_spec(TrackingConfig(uri="https://here"), tmp_path).uri == "https://here"
    assert tracker_spec(TrackingConfig(uri="databricks"), tmp_path).uri == "databricks"
    assert tracker_spec(TrackingConfig(uri="databricks://profile"), tmp_path).uri == "databricks://profile"


@pytest.mark.parametrize("uri", ["file:///runs", "./mlruns", "mlruns", "/data/runs"])
def test_a_folder_is_refused_with_the_sqlite_that_would_do(uri: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"use sqlite:///.*runs/mlflow\.db"):
        tracker_spec(TrackingConfig(uri=uri), tmp_path)


def test_an_unknown_kind_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"banana.*sqlite, postgresql"):
        tracker_spec(TrackingConfig(uri="banana://x"), tmp_path)


def test_a_relative_sqlite_file_is_the_same_for_workers_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        tracker_spec(TrackingConfig(uri="sqlite:///runs/m.db"), "out").uri
        == f"sqlite:///{tmp_path}/runs/m.db"
    )
    assert tracker_spec(TrackingConfig(uri="sqlite:////data/m.db"), "out").uri == "sqlite:////data/m.db"
    assert tracker_spec(TrackingConfig(), "out").spool == tmp_path / "out" / "spool"


def test_a_password_is_hidden() -> None:
    assert redacted("postgresql+psycopg://me:s3cret@db:5432/x") == "postgresql+psycopg://me:***@db:5432/x"
    assert redacted("http://127.0.0.1:5000") == "http://127.0.0.1:5000"


def test_provenance_says_versions_host_and_device() -> None:
    import torch

    found = provenance()
    assert found["version.torch"] == torch.__version__
    assert found["version.rayft"]
    assert found["host"]
    assert found["device"]
    assert all(isinstance(value, str) and value for value in found.values())


def test_provenance_outside_a_repository_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    assert not [name for name in provenance() if name.startswith("git")]

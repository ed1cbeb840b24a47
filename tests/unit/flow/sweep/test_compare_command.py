from pathlib import Path

import pytest

from rayft.flow.sweep.record import _compare_command


@pytest.mark.parametrize(
    ("uri", "command"),
    [
        (
            f"sqlite:///{Path.cwd()}/runs/demo/mlflow.db",
            "mlflow ui --backend-store-uri sqlite:///runs/demo/mlflow.db",
        ),
        (
            "sqlite:////data/my runs/mlflow.db",
            "mlflow ui --backend-store-uri 'sqlite:////data/my runs/mlflow.db'",
        ),
        (
            "postgresql://me:secret@db/runs",
            "mlflow ui --backend-store-uri 'postgresql://me:***@db/runs'",
        ),
        ("http://tracking:5000", "python -m webbrowser http://tracking:5000"),
        ("databricks", ""),
    ],
)
def test_the_runs_can_be_looked_at_and_no_password_is_told(uri: str, command: str) -> None:
    assert _compare_command(uri) == command

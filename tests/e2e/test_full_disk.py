"""A sweep whose disk becomes full ends with one error, and continues when there is room again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from rayft.flow.config import PipelineConfig
from tests.disks import Disk, mounted
from tests.e2e.small import adapters, events, histories
from tests.processes import process

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

ROOMY = 4 * 2**30
"""Bytes of a disk on which a sweep may start. Unused bytes take no memory."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk", ROOMY) as made:
        yield made


def sweep(config: Path, folder: Path, fill: Callable[[], bool] | None = None) -> tuple[int, str]:
    """Run the command, calling `fill` until that has filled the disk; return the status and the output."""
    command = [sys.executable, "-m", "rayft.cli", "sweep", str(config), "--set", f"output={folder}"]
    log, address = config.with_suffix(".log"), ray.get_runtime_context().gcs_address
    with process(command, log, RAY_ADDRESS=address, COLUMNS="1000") as running:
        deadline = time.monotonic() + 240
        while fill is not None and running.poll() is None and not fill():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        return running.wait(timeout=240), log.read_text()


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_sweep_continues_when_there_is_room_again(
    long_config: PipelineConfig, uninterrupted: Path, disk: Disk, times: int
) -> None:
    folder, config = disk.folder / "out", uninterrupted.parent / "long.yaml"

    def full_after(ready: Callable[[], bool]) -> Callable[[], bool]:
        def fill() -> bool:
            if not ready():
                return False
            try:
                disk.leave(0)
            except subprocess.CalledProcessError:
                return False  # More has been written meanwhile.
            return True

        return fill

    # While the first trial trains, and when two have trained.
    moments: list[Callable[[], bool]] = [
        lambda: len(events(folder)) >= 2,
        lambda: len([*folder.glob("trials/*/result.json")]) == 2,
    ]
    for ready in moments[:times]:
        status, said = sweep(config, folder, full_after(ready))
        assert status == 1
        assert said.count("DiskFullError: ") == said.count(f"the disk of {disk.folder}") == 1
        assert "Traceback" not in said
        assert "failed" not in said
        disk.resize(ROOMY)
    status, said = sweep(config, folder)
    assert status == 0, said
    assert adapters(folder) == adapters(uninterrupted)
    assert events(folder) == events(uninterrupted)
    assert histories(folder) == histories(uninterrupted)
    assert (folder / "report.html").is_file()

"""Ray and the lanes of a sweep start while the command imports and checks; and end with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rayft.report.record import SweepRecord

pytestmark = pytest.mark.ray

COMMAND = """
import sys
import time

from rayft.flow import ahead

class Watched(ahead.Ahead):
    def _start(self):
        executor = super()._start()
        if executor is not None:
            print("lanes started", flush=True)
        return executor

ahead.FEWEST_CORES, ahead.Ahead = 1, Watched

from rayft.cli import main

main()
"""
SHORT = [
    "optim.steps=4",
    "sweep.grace=2",
    "data.train=8",
    "data.val=2",
    "data.test=2",
    "sweep.trials=2",
    "squeeze.ranks=[]",
]


def run(folder: Path, *overrides: str, command: str = "sweep") -> subprocess.CompletedProcess[str]:
    """Run a command on the packaged `tiny`, with Ray's files in a folder of its own."""
    (folder / "tmp").mkdir(exist_ok=True)
    settings = [f"output={folder / 'out'}", *SHORT, *overrides]
    options = [part for one in settings for part in ("--set", one)]
    return subprocess.run(
        [sys.executable, "-c", COMMAND, command, "tiny", *options],
        env={**os.environ, "RAY_ADDRESS": "local", "TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )  # fmt: skip


def left_running(folder: Path) -> list[str]:
    """Return the processes that use a folder of Ray's."""
    lines = [" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(folder) in line]


@pytest.fixture
def folder() -> Iterator[Path]:
    # Short, because the paths of Ray's sockets lie below it.
    made = Path(tempfile.mkdtemp(prefix="ra"))
    yield made
    shutil.rmtree(made)


def test_a_sweep_uses_the_lanes_that_were_started_for_it(folder: Path) -> None:
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lanes started" in done.stdout
    assert [trial.status for trial in SweepRecord.load(folder / "out").trials] == ["finished", "finished"]
    # Nothing of the lanes is left: neither files nor processes.
    assert not [*(folder / "tmp").glob("rayft-lanes-*")]
    assert not left_running(folder)
    # The same command again has nothing to train, so it starts no lanes.
    again = run(folder)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "lanes started" not in again.stdout


def test_a_run_uses_the_lane_that_was_started_for_it(folder: Path) -> None:
    done = run(folder, "method.name=lora", command="train")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lanes started" in done.stdout
    assert (folder / "out" / "adapter").is_dir()
    assert not left_running(folder)


def test_lanes_that_were_started_end_if_a_check_fails(folder: Path) -> None:
    done = run(folder, "model.name=/no/such/folder")
    assert done.returncode == 1
    assert "lanes started" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("ModelError: ")
    assert not [*(folder / "tmp").glob("rayft-lanes-*")]
    assert not left_running(folder)
    assert not (folder / "out").exists()


def test_a_machine_that_can_not_hold_the_lanes_is_refused(folder: Path) -> None:
    done = run(folder, "scale.device=cuda", "scale.gpu_share=0.5")
    assert done.returncode == 1
    assert "GPU" in done.stderr.splitlines()[-1]
    assert not left_running(folder)

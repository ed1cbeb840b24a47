"""Ray and the lanes of a sweep start while the command imports and checks; and end with it."""

from __future__ import annotations

import os
import shutil
import signal
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

%s
main()
"""
SLOW_CHECKS = """
import rayft.flow.sweep.run as run

def slow(config):
    print("checking", flush=True)
    time.sleep(60)

run.preflight = slow
"""
SHORT = ["optim.steps=4", "data.train=8", "data.val=2", "data.test=2"]
SEARCH = ["sweep.grace=2", "sweep.trials=2", "squeeze.ranks=[]"]


def run(folder: Path, *overrides: str, command: str = "sweep") -> subprocess.CompletedProcess[str]:
    """Run a command on the packaged `tiny`, with Ray's files in a folder of its own."""
    (folder / "tmp").mkdir(exist_ok=True)
    settings = [f"output={folder / 'out'}", *SHORT, *overrides]
    options = [part for one in settings for part in ("--set", one)]
    return subprocess.run(
        [sys.executable, "-c", COMMAND % "", command, "tiny", *options],
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "RAY_ADDRESS": "local", "TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": str(folder)}


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
    done = run(folder, *SEARCH)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lanes started" in done.stdout
    assert [trial.status for trial in SweepRecord.load(folder / "out").trials] == ["finished", "finished"]
    # Nothing of the lanes is left: neither files nor processes.
    assert not [*(folder / "tmp").glob("rayft-lanes-*")]
    assert not left_running(folder)


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


def test_lanes_that_were_started_end_if_the_checks_are_interrupted(folder: Path) -> None:
    (folder / "tmp").mkdir()
    arguments = ["sweep", "tiny", "--set", f"output={folder / 'out'}"]
    command = [sys.executable, "-c", COMMAND % SLOW_CHECKS, *arguments]
    with subprocess.Popen(
        command, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = {process.stdout.readline().split()[0] for _ in range(3)}
        assert {"lanes", "checking"} <= said
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("Interrupted")
    assert not left_running(folder)
    assert not (folder / "out").exists()

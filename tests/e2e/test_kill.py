"""Interrupted and killed sweeps continue: they lose nothing, and decide and train as if uninterrupted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient

from rayft.errors import ConfigError
from rayft.flow.config import PipelineConfig
from rayft.flow.interrupt import SIGNALS, interrupts
from rayft.sweep import executor as executors
from rayft.sweep.broker import Broker, Patience, Verdict
from tests.e2e.small import adapters, events, histories, run
from tests.e2e.warm import WarmWorkers
from tests.processes import process

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

EVENTS = 14
"""Evaluations of an uninterrupted sweep: of two whole trials, and of a third that stops at its second."""


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Restore the handlers of the signals after the test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupts.forget()


def elsewhere(config: PipelineConfig, name: str, **sweep: Any) -> PipelineConfig:
    changed = {"output": str(config.folder.parent / name), "sweep": config.sweep.model_copy(update=sweep)}
    return config.model_copy(update=changed)


@contextmanager
def when(ready: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Call `act` once, as soon as a condition holds."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            if ready():
                act()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def signalled(folder: Path, after: int, number: signal.Signals) -> Iterator[None]:
    """Send this process a signal after a number of evaluations."""
    interrupts.install()
    with (
        when(lambda: len(events(folder)) >= after, lambda: os.kill(os.getpid(), number)),
        pytest.raises(KeyboardInterrupt),
    ):
        yield
    assert interrupts.status == 128 + number
    interrupts.forget()


def test_an_interrupted_sweep_ends_like_an_uninterrupted_one(
    long_config: PipelineConfig, uninterrupted: Path, warm_workers: WarmWorkers
) -> None:
    again = elsewhere(long_config, "interrupted")
    folder = again.folder
    assert len(events(uninterrupted)) >= EVENTS - 4
    with warm_workers.used(), signalled(folder, 3, signal.SIGINT):
        run(again)
    assert adapters(folder) == {}, "an interrupted trial is recorded as one that has ended"
    state = max(folder.glob("trials/*/checkpoint/*/state.json"))
    assert json.loads(state.read_text())["step"] >= 6
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "rayft"]
    runs = client.search_runs([experiment.experiment_id])
    assert {one.data.tags["rayft.status"] for one in runs if "rayft.status" in one.data.tags} == {
        "interrupted"
    }
    with warm_workers.used(), signalled(folder, 8, signal.SIGTERM):
        run(again)
    assert not (folder / "report.html").exists()

    # With other lanes and restarts, which change no result.
    with warm_workers.used():
        run(elsewhere(long_config, "interrupted", restarts=1))
    assert events(folder) == events(uninterrupted)
    assert adapters(folder) == adapters(uninterrupted)
    assert histories(folder) == histories(uninterrupted)


def test_a_killed_sweep_with_two_lanes_decides_by_its_recorded_order(
    long_config: PipelineConfig, warm_workers: WarmWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = elsewhere(long_config, "killed", lanes=2)
    folder = killed.folder
    command = [sys.executable, "-m", "rayft.cli", "sweep", str(folder.parent / "long.yaml")]
    command += ["--set", f"output={folder}", "--set", "sweep.lanes=2"]
    log, address = folder.parent / "killed.log", ray.get_runtime_context().gcs_address
    with process(command, log, RAY_ADDRESS=address) as running:
        locked = rf"process {running.pid} on .*\) is writing to {folder}"
        deadline = time.monotonic() + 300
        while running.poll() is None and len(events(folder)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
            if len(events(folder)) == 2:
                with pytest.raises(ConfigError, match=locked):
                    run(killed)
        running.kill()
        running.wait()
    assert 4 <= len(events(folder)) < EVENTS - 4, log.read_text()
    with warm_workers.used():
        run(killed)

    order = [event[:2] for event in events(folder)]

    class Ordered(Broker):
        """A broker that lets trials report only in a given order."""

        def __init__(self, attempts: int, patience: Patience) -> None:
            super().__init__(attempts, patience)
            self._left, self._turn = list(order), asyncio.Condition()

        async def report(self, job_id: str, step: int, values: Any) -> Verdict:
            async with self._turn:
                await self._turn.wait_for(lambda: self._left[:1] in ([], [(job_id, step)]))
            verdict = await super().report(job_id, step, values)
            async with self._turn:
                self._left = self._left[1:]
                self._turn.notify_all()
            return verdict

    monkeypatch.setattr(executors, "Broker", Ordered)
    replayed = elsewhere(long_config, "replayed", lanes=2)
    with warm_workers.used():
        run(replayed)
    assert events(replayed.folder) == events(folder)
    assert adapters(replayed.folder) == adapters(folder)
    assert histories(replayed.folder) == histories(folder)


def test_the_command_exits_as_a_shell_expects(tmp_path: Path) -> None:
    script = "from rayft.flow import commands; import os; commands.guarded(lambda: os.kill(os.getpid(), {}))"
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        done = subprocess.run(
            [sys.executable, "-c", script.format(int(number))], capture_output=True, text=True, check=False
        )
        assert done.returncode == status
        assert "Interrupted: what is done is kept. Continue with: " in done.stderr
        assert "Traceback" not in done.stderr


def test_a_signal_that_a_command_waits_for_is_not_an_interrupt() -> None:
    script = """
import os, signal, threading
from rayft.flow import commands
from rayft.flow.interrupt import interrupts

def wait():
    interrupts.wait()
    print("stopping")

threading.Timer(3.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
commands.guarded(wait)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "stopping"
    assert "Interrupted" not in done.stderr

"""Interrupted and killed sweeps that continue: nothing is lost, decided otherwise or trained otherwise."""

from __future__ import annotations

import asyncio
import io
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
import yaml
from mlflow import MlflowClient
from rich.console import Console

from rayft.errors import ConfigError
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.display import Display
from rayft.flow.interrupt import SIGNALS, interrupts
from rayft.flow.sweep import run_sweep
from rayft.report.frame import SweepRecord
from rayft.sweep import executor as executors
from rayft.sweep.broker import Broker, Patience, Verdict
from rayft.sweep.schedule import EVENTS_FILE, EventLog

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

EVENTS = 14
"""Evaluations of a whole sweep: two trials to the end, the third stopped at its second one."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """A sweep of four trials that are evaluated at every second of 12 steps."""
    folder = tmp_path_factory.mktemp("kill")
    tiny = load_config("tiny", [f"output={folder / 'whole'}"]).model_dump(mode="json")
    tiny["data"] |= {"train": 24, "val": 4, "test": 4}
    tiny["optim"] |= {"steps": 12, "warmup": 1}
    tiny["evaluate"] |= {"every": 2, "checkpoint_seconds": 0}
    tiny["scale"] |= {"device": "cpu", "dtype": "float32", "threads": 1}
    tiny["sweep"] |= {"methods": {"lora": {"ranks": [4], "lr": [1e-2, 1e-5, 2e-2]}}, "grace": 4}
    tiny["squeeze"] = {"ranks": []}
    (folder / "kill.yaml").write_text(yaml.safe_dump(tiny))
    return load_config(folder / "kill.yaml")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Put the signals' handlers back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupts.forget()


def elsewhere(config: PipelineConfig, name: str, **sweep: Any) -> PipelineConfig:
    changed = {"output": str(config.folder.parent / name), "sweep": config.sweep.model_copy(update=sweep)}
    return config.model_copy(update=changed)


def run(config: PipelineConfig) -> tuple[SweepRecord, str]:
    said = io.StringIO()
    return run_sweep(config, Display(Console(file=said, width=1000))), said.getvalue()


def events(folder: Path) -> list[tuple[str, int, float, bool]]:
    log = EventLog(folder / EVENTS_FILE)
    return [(one.trial, one.step, one.val_loss, one.go_on) for one in log.decisions]


def adapters(folder: Path) -> dict[str, tuple[bool, int, str]]:
    """What each trial left: whether it finished, its last step, the hash of its adapter."""
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("trials/*/result.json")}
    return {
        key: tuple(values["result"][name] for name in ("finished", "steps", "content_hash"))  # type: ignore[misc]
        for key, values in results.items()
    }


def histories(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Every metric of every tracked trial, in MLflow's order, but those that clocks decide."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "rayft"]
    found = {}
    for one in client.search_runs([experiment.experiment_id], "tags.`rayft.kind` = 'trial'"):
        metrics = [name for name in one.data.metrics if name in ("train_loss", "val_loss", "lr", "grad_norm")]
        assert one.info.run_name not in found, "a trial has two runs"
        found[one.info.run_name] = {
            name: [(item.step, item.value) for item in client.get_metric_history(one.info.run_id, name)]
            for name in metrics
        }
    return found


@contextmanager
def when(ready: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Do something once, as soon as a condition holds."""
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
    """Send this process a signal after so many evaluations."""
    interrupts.install()
    with (
        when(lambda: len(events(folder)) >= after, lambda: os.kill(os.getpid(), number)),
        pytest.raises(KeyboardInterrupt),
    ):
        yield
    assert interrupts.status == 128 + number
    interrupts.forget()


@pytest.fixture(scope="module")
def whole(local_ray: None, config: PipelineConfig) -> Path:
    run(config)
    return config.folder


def test_an_interrupted_sweep_ends_as_one_that_was_not(config: PipelineConfig, whole: Path) -> None:
    again = elsewhere(config, "interrupted")
    folder = again.folder
    assert len(events(whole)) >= EVENTS - 4
    with signalled(folder, 3, signal.SIGINT):
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
    with signalled(folder, 8, signal.SIGTERM):
        run(again)
    assert not (folder / "report.html").exists()

    # With other lanes and restarts, which change no result.
    run(elsewhere(config, "interrupted", restarts=1))
    assert events(folder) == events(whole)
    assert adapters(folder) == adapters(whole)
    assert histories(folder) == histories(whole)


def test_a_killed_sweep_with_two_lanes_decides_by_its_recorded_order(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    killed = elsewhere(config, "killed", lanes=2)
    folder = killed.folder
    command = [sys.executable, "-m", "rayft.cli", "sweep", str(folder.parent / "kill.yaml")]
    process = subprocess.Popen(
        [*command, "--set", f"output={folder}", "--set", "sweep.lanes=2"],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.poll() is None and len(events(folder)) < 4:
        time.sleep(0.02)
        if len(events(folder)) == 2:
            with pytest.raises(ConfigError, match=rf"process {process.pid} on .*\) is writing to {folder}"):
                run(killed)
    process.kill()
    assert process.communicate()[0] is not None
    assert 4 <= len(events(folder)) < EVENTS - 4, "the sweep ended before it could be killed"
    run(killed)

    order = [event[:2] for event in events(folder)]

    class Ordered(Broker):
        """Lets trials report in a given order alone."""

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
    replayed = elsewhere(config, "replayed", lanes=2)
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

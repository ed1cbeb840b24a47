"""The process of a rehearsal: when it is started, and that it ends with the command or for a lane."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rayft.flow import rehearse
from rayft.sweep.rehearsal import VARIABLE, end_rehearsal

COMMAND = """
import os, sys
from rayft.flow import rehearse
rehearse.DEVICES, rehearse.FEWEST_CORES = "/dev/null", 1
rehearse.start_rehearsal("no-such.yaml", ["sweep.slots=2"])
heavy = [name for name in ("torch", "ray", "transformers", "mlflow") if name in sys.modules]
print(rehearse._processes[0].pid, os.environ[rehearse.VARIABLE], *heavy, flush=True)
sys.stdin.read()
"""


def ended(process: psutil.Process, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


class Command:
    """A command that has started a rehearsal, and goes on until its input ends."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdout is not None
        pid, file, *self.heavy = self.process.stdout.readline().decode().split()
        self.rehearsal, self.file = psutil.Process(int(pid)), Path(file)

    def end(self) -> bytes:
        """End it regularly, and return what it has printed since."""
        return b"".join(self.process.communicate())


@pytest.fixture
def command(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Command]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    path = [getattr(request, "param", ""), environment.get("PYTHONPATH", "")]
    if path[0]:
        path[0] = str(tmp_path)
        (tmp_path / "torch.py").write_text("raise ImportError", encoding="utf-8")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = Command({**environment, "RAY_ADDRESS": "local"})
    yield command
    command.process.kill()
    command.process.wait()
    for stream in (command.process.stdin, command.process.stdout, command.process.stderr):
        if stream is not None and not stream.closed:
            stream.close()


def test_it_is_started_before_what_takes_long_to_import_and_shows_nothing(command: Command) -> None:
    assert command.heavy == []
    assert command.rehearsal.nice() == rehearse.LOWEST
    assert command.end() == b""
    assert command.process.returncode == 0
    assert ended(command.rehearsal)
    assert not command.file.parent.exists()


def test_it_ends_when_the_command_is_killed(command: Command) -> None:
    command.process.kill()
    assert ended(command.rehearsal)


def test_it_ends_for_a_lane(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(command.file))
    end_rehearsal()
    assert ended(command.rehearsal)
    assert command.process.poll() is None


@pytest.mark.parametrize("command", ["broken"], indirect=True)
def test_what_is_wrong_ends_it_alone(command: Command) -> None:
    """PyTorch can't be imported, which is the command's own to say."""
    assert ended(command.rehearsal)
    assert not command.file.exists()
    assert command.end() == b""
    assert command.process.returncode == 0


@pytest.fixture
def useful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse, "DEVICES", "/dev/null")
    monkeypatch.setattr(rehearse, "FEWEST_CORES", 1)
    for name in (VARIABLE, "CUDA_VISIBLE_DEVICES", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("useful")
def test_there_is_none_where_it_is_plain_that_it_is_of_no_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert rehearse._useful()
    for name, value in (("RAY_ADDRESS", "auto"), ("CUDA_VISIBLE_DEVICES", ""), (VARIABLE, "off")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not rehearse._useful()
    monkeypatch.setattr(rehearse, "FEWEST_CORES", 10**6)
    assert not rehearse._useful()
    monkeypatch.setattr(rehearse, "FEWEST_CORES", 1)
    monkeypatch.setattr(rehearse, "DEVICES", str(tmp_path / "none*"))
    rehearse.start_rehearsal("tiny", ())
    assert VARIABLE not in os.environ


@pytest.mark.usefixtures("useful")
def test_a_machine_that_starts_no_process_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(rehearse.subprocess, "Popen", full)
    rehearse.start_rehearsal("tiny", ())
    assert VARIABLE not in os.environ


def test_the_log_waits_for_the_lanes_folder(tmp_path: Path) -> None:
    log = rehearse._Log()
    log.write_to(tmp_path)
    record = rehearse.logging.makeLogRecord({"msg": "first"})
    log.emit(record)
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "ray").mkdir()
    log.emit(rehearse.logging.makeLogRecord({"msg": "second"}))
    log.wait()
    lines = (tmp_path / rehearse.LOG).read_text(encoding="utf-8").splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["first", "second"]

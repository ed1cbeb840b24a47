"""A lane ends the rehearsal of its command, and waits for it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayft.data.section import DataConfig
from rayft.sweep import lane as lane_module
from rayft.sweep import rehearsal, request
from rayft.sweep.rehearsal import VARIABLE, end_rehearsal
from rayft.sweep.request import TrainRequest
from rayft.train.run import RunConfig

HOLDER = """
import fcntl, pathlib, sys, time
path = pathlib.Path(sys.argv[1])
with path.open() as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    while path.exists():
        time.sleep(0.01)
    time.sleep(0.2)
    path.with_name("ended").touch()
"""


def test_a_lane_waits_until_the_rehearsal_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "running"
    path.touch()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    monkeypatch.setenv(VARIABLE, str(path))
    end_rehearsal()
    assert not path.exists()
    assert (tmp_path / "ended").exists()
    holder.wait()
    # There is none any more.
    end_rehearsal()


def test_a_lane_does_not_wait_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "running"
    path.touch()
    monkeypatch.setenv(VARIABLE, str(path))
    monkeypatch.setattr(rehearsal, "WAIT_SECONDS", 0.1)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end_rehearsal()
    assert not path.exists()


def test_a_lane_that_is_about_to_train_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The base is loaded beside it; what is timed, or needs all memory, comes after it."""
    done: list[str] = []

    class LoadedError(Exception):
        pass

    def ended() -> None:
        done.append("ended")
        raise LoadedError

    class FakeLane:
        loaded = False

        def session(self, *_: object) -> Any:
            done.append("loaded")
            return SimpleNamespace(loaded=SimpleNamespace(model=None))

    lane: Any = FakeLane()
    run = RunConfig(data=DataConfig(source="jsonl", name="x.jsonl"))
    monkeypatch.setattr(request, "end_rehearsal", ended)
    with pytest.raises(LoadedError):
        TrainRequest("key", "name", run, str(tmp_path), ())(lane)
    monkeypatch.setattr(lane_module, "end_rehearsal", ended)
    monkeypatch.setattr(lane_module, "unpackable", lambda _: "")
    monkeypatch.setattr(lane_module, "sizing", lambda *_: done.append("sized"))
    with pytest.raises(LoadedError):
        lane_module.Lane._size(lane, run, lane.session())
    assert done == ["loaded", "ended", "loaded", "ended"]


def test_other_values_of_the_variable_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("off").touch()
    monkeypatch.setenv(VARIABLE, "off")
    end_rehearsal()
    assert os.listdir() == ["off"]

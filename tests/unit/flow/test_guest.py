"""Functions of the Python API refuse arguments of wrong types, and leave the process as they found it."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from threading import Event, Thread
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pytest
import torch

from rayft.errors import ConfigError
from rayft.flow import guest
from rayft.flow.address import own
from rayft.flow.guest import VARIABLES, alone, checked, left_as_found


@checked
def called(
    path: str | PathLike[str] = "",
    ranks: Sequence[int] = (),
    *,
    names: Sequence[str] = (),
    energy: float | None = None,
    config: Mapping[str, Any] | None = None,
    part: Literal["val", "test"] | None = None,
    quiet: bool = False,
) -> tuple[Any, ...]:
    return path, ranks, names, energy, config, part, quiet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": 3}, r"path must be str \| PathLike\[str\], not 3"),
        ({"path": b"mine"}, "path must be"),
        ({"ranks": 2}, r"ranks must be Sequence\[int\], not 2"),
        ({"ranks": ["2"]}, r"ranks must be Sequence\[int\], not \['2'\]"),
        ({"ranks": [True]}, "ranks must be"),
        ({"ranks": [2.0]}, "ranks must be"),
        ({"names": "gsm8k"}, r"names must be Sequence\[str\], not 'gsm8k'"),
        ({"energy": "0.9"}, r"energy must be float \| None, not '0.9'"),
        ({"config": [1]}, r"config must be Mapping\[str, Any\] \| None, not \[1\]"),
        ({"part": "train"}, "part must be .*'val', 'test'.*, not 'train'"),
        ({"quiet": 1}, "quiet must be bool, not 1"),
        ({"names": "x" * 1000}, r"not 'x{79}…$"),
    ],
)
def test_an_argument_of_a_wrong_type_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        called(**options)


class Place:
    def __fspath__(self) -> str:
        return "mine"


@pytest.mark.parametrize(
    "options",
    [
        {"path": Path("mine")},
        {"path": Place()},
        {"ranks": range(1, 3)},
        {"ranks": deque([1])},
        {"ranks": (np.int64(2), np.uint8(3))},
        {"energy": 1},
        {"energy": np.float32(0.5)},
        {"config": MappingProxyType({"seed": 1})},
        {"part": "val"},
    ],
)
def test_what_is_as_good_as_the_type_is_passed_on_as_it_is(options: dict[str, Any]) -> None:
    (given,) = options.values()
    assert any(value is given for value in called(**options))


def test_a_wrong_name_is_the_error_of_any_function() -> None:
    with pytest.raises(TypeError, match="rank"):
        called(rank=2)  # type: ignore[call-arg]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All variables are unset but this one, which the program has set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VARIABLES[0], "mine")
    return VARIABLES[0]


def test_environment_variables_are_what_they_were(variables: str) -> None:
    @left_as_found()
    def fails() -> None:
        os.environ.update(dict.fromkeys(VARIABLES, "ours"))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert {name: os.environ[name] for name in VARIABLES if name in os.environ} == {variables: "mine"}


def test_of_several_threads_the_last_restores_them(variables: str) -> None:
    begun, over = Event(), Event()

    def run() -> None:
        with left_as_found():
            os.environ[variables] = "ours"
            begun.set()
            over.wait(10)

    thread = Thread(target=run)
    thread.start()
    begun.wait(10)
    with left_as_found():
        pass
    assert os.environ[variables] == "ours"
    over.set()
    thread.join()
    assert os.environ[variables] == "mine"


def test_the_handler_of_a_signal_is_what_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with left_as_found():
        signal.signal(signal.SIGTERM, lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("joined", [True, False])
def test_a_cluster_that_was_joined_is_left_and_the_programs_own_is_not(
    joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[None] = []
    monkeypatch.setattr("ray.shutdown", lambda: left.append(None))
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(own, "joined", False)
    with left_as_found():
        own.joined = joined
        with left_as_found():
            pass
        assert not left
    assert len(left) == joined
    assert not own.joined


def test_tensors_are_made_on_the_cpu() -> None:
    with torch.device("meta"):
        with left_as_found():
            assert torch.empty(1).device.type == "cpu"
        assert torch.empty(1).device.type == "meta"


def test_functions_that_start_ray_wait_for_each_other() -> None:
    running: list[int] = []
    most = 0

    @alone()
    def run(number: int) -> None:
        nonlocal most
        running.append(number)
        most = max(most, len(running))
        Event().wait(0.1)
        running.remove(number)

    threads = [Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_every_function_of_the_api_does_this() -> None:
    source = (Path(guest.__file__).parents[1] / "api.py").read_text(encoding="utf-8")
    for name in ("init", "evaluate", "chat", "load"):
        assert f"@checked\n@left_as_found()\ndef {name}(" in source
    for name in ("train", "sweep", "squeeze"):
        assert f"@checked\n@alone()\n@left_as_found()\ndef {name}(" in source
    assert "export = checked(left_as_found()(export_adapter))" in source

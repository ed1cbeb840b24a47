"""When Ray and lanes are started ahead of a command's checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayft.errors import ConfigError
from rayft.flow import address, ahead
from rayft.flow.config import STAMP_FILE


class Recorded:
    """Takes the place of `Ahead`, and notes what it is asked to start."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, int]] = []
        self.closed = 0

    def start_lanes(self, config: Any, lanes: int) -> None:
        self.asked.append((config and config.name, lanes))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be on a machine with cores to spare and without a cluster."""
    monkeypatch.setattr(ahead, "Ahead", Recorded)
    monkeypatch.setattr(ahead, "FEWEST_CORES", 1)
    monkeypatch.setattr(address, "find_address", lambda: ("", False))


def begin(folder: Path, *overrides: str, **how: bool) -> Recorded:
    settings = [f"output={folder / 'out'}", "scale.device=cpu", *overrides]
    with ahead.ahead("tiny", settings, **how) as started:
        assert isinstance(started, Recorded)
        assert not started.closed
    assert started.closed == 1
    return started


def test_a_sweep_gets_its_lanes_and_a_run_gets_one(tmp_path: Path) -> None:
    assert begin(tmp_path, "sweep.lanes=3").asked == [("tiny", 3)]
    assert begin(tmp_path, "sweep.lanes=3", "method.name=lora", search=False).asked == [("tiny", 1)]


@pytest.mark.parametrize("setting", ["sweep.executor=isolated", "sweep.methods=3", "no.such=1"])
def test_nothing_but_ray_starts_for_groups_of_their_own_and_for_mistakes(
    tmp_path: Path, setting: str
) -> None:
    assert begin(tmp_path, setting).asked == [(None, 1)]


def test_nothing_but_ray_starts_for_a_sweep_that_has_begun(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert begin(tmp_path).asked == [("tiny", 1)]
    (tmp_path / "out" / STAMP_FILE).touch()
    assert begin(tmp_path).asked == [(None, 1)]


def test_nothing_starts_on_a_cluster_or_with_few_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, name, value in (
        (address, "find_address", lambda: ("10.0.0.1:6379", False)),
        (ahead, "FEWEST_CORES", 100_000),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            with ahead.ahead("tiny", [f"output={tmp_path}"]) as started:
                assert started is None


def test_ray_ends_if_the_command_fails(tmp_path: Path) -> None:
    seen: list[Any] = []

    def command() -> None:
        with ahead.ahead("tiny", [f"output={tmp_path}"]) as started:
            seen.append(started)
            raise ConfigError("wrong")

    with pytest.raises(ConfigError):
        command()
    assert seen[0].closed == 1

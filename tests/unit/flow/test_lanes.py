"""A command whose lanes can't go on ends with one error, or saves what they were doing."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import pytest
from ray.exceptions import ActorDiedError
from rich.console import Console

from rayft.errors import ResourceError
from rayft.flow.display import Display
from rayft.flow.lanes import use_lanes


class Lanes:
    """What `use_lanes` asks of an executor."""

    def __init__(self, saved: Sequence[str] = ("a trial",), late: Sequence[str] = ()) -> None:
        self.asked: list[str] = []
        self.saved, self.late = [*saved], [*late]

    def interrupt(self, meanwhile: Callable[[Sequence[str]], None]) -> tuple[list[str], list[str]]:
        self.asked.append("interrupt")
        meanwhile([*self.saved, *self.late])
        return self.saved, self.late

    def close(self) -> None:
        self.asked.append("close")


def test_the_error_about_a_dead_process_names_the_way_to_continue() -> None:
    lanes = Lanes()
    with (
        pytest.raises(ResourceError, match=r"was killed or crashed; .*Run the same command again"),
        use_lanes(lanes, Display(Console(quiet=True))),  # type: ignore[arg-type]
    ):
        raise ActorDiedError
    assert lanes.asked == ["close"]


def test_an_interrupt_saves_the_trials_before_the_lanes_are_closed() -> None:
    lanes, said = Lanes(), io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        use_lanes(lanes, Display(Console(file=said, width=200))),  # type: ignore[arg-type]
    ):
        raise KeyboardInterrupt
    assert lanes.asked == ["interrupt", "close"]
    assert "saved: a trial" in said.getvalue()


@pytest.mark.parametrize(
    ("saved", "late", "words"),
    [
        (["a"], ["b", "c"], ["saved: a", "not saved in time: b, c;"]),
        ([], ["b"], ["not saved in time: b;"]),
        ([], [], ["no trial was training"]),
    ],
)
def test_a_trial_that_takes_too_long_to_save_does_not_count_as_saved(
    saved: list[str], late: list[str], words: list[str]
) -> None:
    said = io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        use_lanes(Lanes(saved, late), Display(Console(file=said, width=200))),  # type: ignore[arg-type]
    ):
        raise KeyboardInterrupt
    _, *lines = said.getvalue().splitlines()
    assert len(lines) == len(words)
    assert all(any(line.strip().startswith(word) for line in lines) for word in words)

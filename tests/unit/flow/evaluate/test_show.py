"""How questions and answers are printed."""

from __future__ import annotations

import io

from rich.console import Console

from rayft.flow.evaluate.record import Answer, Evaluation, TargetResult
from rayft.flow.evaluate.show import show_answers

LONG = "a long question " * 12
FOUND = Evaluation(
    targets=(
        TargetResult(
            name="one", answers=(Answer(question=LONG, wanted="5", got="\x1b[2J[bold]6", score=0),) * 3
        ),
    )
)


def printed(*, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=60, markup=False, color_system=None)
    show_answers(FOUND, 2, console)
    return stream.getvalue()


def test_a_terminal_wraps_texts_beside_their_names() -> None:
    shown = printed(terminal=True)
    assert max(map(len, shown.splitlines())) <= 60
    assert shown.count("a long question") < 2 * 12 < shown.count("long") + shown.count("question")
    assert shown.count("wanted") == 2


def test_elsewhere_each_text_is_one_line() -> None:
    lines = printed(terminal=False).splitlines()
    assert lines[1:5] == ["1", f"question: {LONG.strip()}", "wanted: 5", r"got (0): \x1b[2J[bold]6"]
    assert len(lines) == 10


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert "\x1b[2J" not in printed(terminal=True)
    assert r"\x1b[2J[bold]6" in printed(terminal=True)

"""A conversation: what is asked, shown, kept and forgotten."""

from __future__ import annotations

import io
import signal
from contextlib import nullcontext

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rayft.cli import app
from rayft.flow.chat.models import Options
from rayft.flow.chat.talk import talk
from tests.unit.flow.chat.echo import Echo

OPTIONS = Options(0.0, 8)


def said(lines: str, *models: Echo, system: str | None = None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    out = io.StringIO()
    console = Console(file=out, width=40, markup=False, emoji=False, highlight=False)
    talk(models, console, OPTIONS, system)
    return out.getvalue()


def test_each_line_is_a_question_and_answers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo()
    long = "word " * 30
    shown = said(
        f"one\n\n{long}\n/reset\ntwo\n/quit\nthree\n", model, system="Be kind", monkeypatch=monkeypatch
    )
    assert shown == f"so one[/red]\nso {long.strip()}[/red]\nso two[/red]\n"
    assert model.asked == [
        [("system", "Be kind"), ("user", "one")],
        [("system", "Be kind"), ("user", "one"), ("assistant", "so one[/red]"), ("user", long.strip())],
        [("system", "Be kind"), ("user", "two")],
    ]


def test_two_are_asked_the_same_and_each_remembers_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Echo("one"), Echo("two")
    assert said("a\n", one, two, monkeypatch=monkeypatch) == "one: so a[/red]\ntwo: so a[/red]\n"
    assert one.asked == two.asked


def test_an_error_is_shown_and_its_question_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo()
    shown = said("fail\none\n", model, monkeypatch=monkeypatch)
    assert shown == "ResourceError: it is too late\nso one[/red]\n"
    assert model.asked[-1] == [("user", "one")]


def test_the_command_fails_at_its_end_if_a_question_was_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo()
    monkeypatch.setattr("rayft.flow.chat.models.open_models", lambda *_, **__: nullcontext([model]))
    for lines, problem in (("fail\none\n", "not answered: 1 of the questions"), ("one\n", "")):
        shown = CliRunner().invoke(app, ["chat", "echo"], input=lines)
        assert shown.output.endswith("so one[/red]\n")
        assert problem in str(shown.exception)
        assert bool(shown.exit_code) == bool(problem)


def test_an_unknown_command_is_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo()
    assert said("/rest now\n", model, monkeypatch=monkeypatch).startswith("there is no command /rest: /reset")
    assert model.asked == []


def test_ctrl_c_stops_an_answer_but_not_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = Echo(), signal.getsignal(signal.SIGINT)
    assert said("wait\none\n", model, monkeypatch=monkeypatch) == "so  (stopped)\nso one[/red]\n"
    assert model.asked[-1] == [("user", "wait"), ("assistant", "so "), ("user", "one")]
    assert signal.getsignal(signal.SIGINT) is before


def test_in_a_terminal_two_answers_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=True, markup=False, emoji=False, highlight=False)
    talk([Echo("one"), Echo("two")], console, OPTIONS)
    line = next(line for line in reversed(out.getvalue().splitlines()) if "[/red]" in line)
    assert line.count("so a[/red]") == 2


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_control_characters_do_not_reach_the_terminal(
    names: tuple[str, ...], terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\x1b]0;b\x07\n"))
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, markup=False, color_system=None)
    talk([Echo(name) for name in names], console, OPTIONS)
    assert r"so a\x1b]0;b\x07[/red]" in out.getvalue()
    assert "\x1b]0;" not in out.getvalue()

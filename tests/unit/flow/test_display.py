"""Everything that a command prints is printed unchanged."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from rayft.errors import DataError
from rayft.flow.commands import guarded
from rayft.flow.console import terminal
from rayft.flow.display import Display


def test_a_line_is_printed_unchanged() -> None:
    said = io.StringIO()
    Display(Console(file=said, width=200)).say("line 3: '[red]x[/] :smile: [/nothing]'")
    assert said.getvalue() == "  line 3: '[red]x[/] :smile: [/nothing]'\n"


ODD = "[/INST] [bold]x[/bold] :smile: [Paris"


def test_names_answers_and_errors_are_printed_unchanged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    table = Table("model", ODD, title=ODD)
    table.add_row("base", ODD)
    console = terminal()
    console.print(table)
    console.print(f"right answer: {ODD}", highlight=False)
    assert capsys.readouterr().out.count(ODD) == 4

    def fails() -> None:
        raise DataError(ODD)

    with pytest.raises(SystemExit):
        guarded(fails)
    assert capsys.readouterr().err == f"DataError: {ODD}\n"


def test_a_log_says_how_long_answering_takes_if_that_is_long() -> None:
    said = io.StringIO()
    display = Display(Console(file=said, width=200))
    job = {"kind": "score", "state": "running"}
    display._update("base", job)
    display._update("base", job | {"step": 50, "steps": 400, "seconds": 12.0})
    display._update("base", job | {"step": 100, "steps": 400, "seconds": 24.0})
    display._update("short", job | {"step": 50, "steps": 100, "seconds": 1.0})
    assert said.getvalue() == "  base: answering, 1m 24s left\n"

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


def test_a_terminal_shows_the_stage_that_runs_and_a_line_for_each_that_is_done() -> None:
    said = io.StringIO()
    console = Console(file=said, width=200, force_terminal=True, color_system=None)
    display = Display(console)
    display.plan("check", "search", "serve")
    with display.stage("search (4 trials)"):
        assert [(row.completed, row.total, row.fields["note"]) for row in display._progress.tasks] == [
            (1, 3, "stage 2 of 3")
        ]
        assert display._progress.live.is_started
    assert not display._progress.live.is_started
    assert "✓ search (4 trials): 0.0 s\n" in said.getvalue()
    assert "search (4 trials) …" not in said.getvalue()


def test_a_log_gets_a_line_when_a_stage_begins_and_when_it_ends() -> None:
    said = io.StringIO()
    display = Display(Console(file=said, width=200))
    with pytest.raises(DataError), display.stage("check"):
        raise DataError(ODD)
    with display.stage("search"):
        pass
    assert said.getvalue() == "check …\nsearch …\n  search: 0.0 s\n"

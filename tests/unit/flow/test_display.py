"""Everything that a command prints is printed unchanged."""

from __future__ import annotations

import io
import re
import time
from types import SimpleNamespace
from typing import Any

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
    said, clock = io.StringIO(), [0.0]
    display = Display(Console(file=said, width=200))
    display._progress.get_time = lambda: clock[0]
    job = {"kind": "score", "state": "running"}
    for name, total in (("base", 400), ("short", 200)):
        display._update(name, job)
        for step in (50, 100, 150):
            clock[0] += 10.0
            display._update(name, job | {"step": step, "steps": total})
    assert said.getvalue() == "  base: answering, 1m 00s left\n"


class Call:
    """A method of an actor that returns one thing after the other, and at the end the last one."""

    def __init__(self, *found: Any) -> None:
        self._found = list(found)

    def remote(self, *_: Any) -> Any:
        return self._found.pop(0) if self.left > 1 else self._found[0]

    @property
    def left(self) -> int:
        return len(self._found)


def test_a_log_has_a_line_for_each_evaluation_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda found: found)
    job = {"id": "one", "kind": "train", "state": "running", "steps": 100, "tokens_per_second": 1234.5}
    states = [{"step": 10, "train_loss": 2.0}, {"step": 20, "val_loss": 1.5}, {"step": 30, "val_loss": 1.5}]
    shown = [[{**job, **state}] for state in states]
    broker = SimpleNamespace(
        snapshot=Call(*shown, [{**job, "state": "final", "step": 100}]), notices=Call([])
    )
    said = io.StringIO()
    display = Display(Console(file=said, width=200))
    monkeypatch.setattr("rayft.flow.display.POLL_SECONDS", 0.01)
    with display.watch(broker, lambda _: "mine"):
        while broker.snapshot.left > 1:
            time.sleep(0.01)
    lines = [line.strip() for line in said.getvalue().splitlines()]
    assert lines[0] == "mine: step 10  training  loss 2.000  1,234 tokens/s"
    assert re.fullmatch(r"mine: step 20  training  [\d.]+ m?s left  val 1\.500  1,234 tokens/s", lines[1])
    assert lines[2:] == ["mine: step 100  done"]


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

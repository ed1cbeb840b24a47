"""What a person is told while a sweep runs."""

from __future__ import annotations

import io

from rich.console import Console

from rayft.flow.display import Display


def test_a_line_is_printed_as_it_is() -> None:
    said = io.StringIO()
    Display(Console(file=said, width=200)).say("line 3: '[red]x[/] :smile: [/nothing]'")
    assert said.getvalue() == "  line 3: '[red]x[/] :smile: [/nothing]'\n"

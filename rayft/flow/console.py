"""The console that commands print to."""

from __future__ import annotations

from rich.console import Console

__all__ = ["terminal"]


def terminal(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it is.

    Names, answers and errors may hold brackets and colons, which rich would otherwise take for markup and
    emoji: `[/INST]` in an answer would end the command with a MarkupError.
    """
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)

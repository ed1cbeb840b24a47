"""Print to the terminal: text without markup, and errors."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from rayft.errors import RayftError

__all__ = ["show_error", "terminal"]


def terminal(*, stderr: bool = False) -> Console:
    """Return a console that prints text unchanged.

    Rich would otherwise read brackets and colons in names, answers and errors as markup and emoji: `[/INST]`
    in an answer would end the command with a MarkupError.

    Args:
        stderr: whether to print to the standard error instead of the standard output.
    """
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def show_error(error: RayftError) -> None:
    """Print an error as the last line of a command."""
    text = str(error).encode(errors="backslashreplace").decode()
    name = Text(type(error).__name__, "bold red")
    terminal(stderr=True).print(Text.assemble(name, ": ", text), soft_wrap=True)

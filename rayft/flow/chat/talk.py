"""The conversation: read a question, show the answers while they are generated, and keep what was said."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rayft.flow.chat.conversation import Side
from rayft.flow.chat.models import ChatModel, Options
from rayft.report.text import printable

__all__ = ["talk"]

COMMANDS = "/reset begins again, /quit ends (so does Ctrl-D), Ctrl-C stops an answer"


def talk(models: Sequence[ChatModel], console: Console, options: Options, system: str | None = None) -> int:
    """Hold a conversation until it is ended, and return the number of questions that a model did not answer.

    Without a terminal, each line of the standard input is a question, and the answers are plain text.

    Args:
        models: one, or two that are asked the same; each remembers its own answers.
        console: for the output.
        options: how answers are generated.
        system: message at the beginning, which the models follow.
    """
    sides, failed = [Side(model, system) for model in models], 0
    if sys.stdin.isatty():
        names = " and ".join(printable(side.model.name) for side in sides)
        console.print(f"{names}: {COMMANDS}", style="dim")
    with _own_interrupts():
        for line in _lines():
            if line == "/quit":
                break
            if line == "/reset":
                for side in sides:
                    side.reset()
            elif line.startswith("/"):
                console.print(
                    f"there is no command {line.split()[0]}: {COMMANDS}", style="yellow", soft_wrap=True
                )
            else:
                _exchange(line, sides, console, options)
                failed += any(side.error is not None for side in sides)
    return failed


def _exchange(question: str, sides: Sequence[Side], console: Console, options: Options) -> None:
    """Ask a question, show the answers, and keep them."""
    for side in sides:
        side.ask(question)
    if len(sides) == 1:
        _one(sides[0], console, options)
    else:
        _beside(sides, console, options)
    for side in sides:
        side.keep()


def _one(side: Side, console: Console, options: Options) -> None:
    def show(_: Side, content: str, reasoning: str) -> None:
        for text, style in ((reasoning, "dim"), (content, None)):
            if text:
                console.print(printable(text), style=style, end="", soft_wrap=True)

    _run([side], options, show)
    note = printable(side.note)
    console.print(f" {note}" if note and side.content else note, style="yellow", soft_wrap=True)


def _beside(sides: Sequence[Side], console: Console, options: Options) -> None:
    if not console.is_terminal:
        _run(sides, options, lambda *_: None)
        for side in sides:
            shown = " ".join(text for text in (side.content, side.note) if text)
            console.print(printable(f"{side.model.name}: {shown}"), soft_wrap=True)
        return
    with Live(console=console, transient=True, refresh_per_second=10) as live:
        _run(sides, options, lambda *_: live.update(_columns(sides, console)))
    # While it grows, a table is cut off at the height of the terminal; this one is whole.
    console.print(_columns(sides, console))


def _columns(sides: Sequence[Side], console: Console) -> Table:
    # So narrow that the terminal's own ^C fits beside it; on a line of its own it would shift the table.
    table = Table(*(printable(side.model.name) for side in sides), width=console.width - 4)
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"
    cells = [
        Text.assemble(
            (printable(side.reasoning), "dim"),
            printable(side.content),
            (printable(f" {side.note}") if side.note else "", "yellow"),
        )
        for side in sides
    ]
    table.add_row(*cells)
    return table


def _run(sides: Sequence[Side], options: Options, show: Callable[[Side, str, str], None]) -> None:
    """Let all sides answer at the same time; Ctrl-C stops them."""

    async def answers() -> None:
        task = asyncio.gather(*(side.answer(options, show) for side in sides))
        loop = asyncio.get_running_loop()
        # Only the main thread receives signals.
        with suppress(ValueError, RuntimeError):
            loop.add_signal_handler(signal.SIGINT, task.cancel)
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(answers())


def _lines() -> Iterator[str]:
    """Yield the lines that are not blank, until the input ends."""
    asks = sys.stdin.isatty()
    if asks:
        # It gives `input` the keys of a line editor, and a history.
        with suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            line = input("> " if asks else "")
        except EOFError:
            if asks:
                print()
            return
        except KeyboardInterrupt:
            # As in a shell, Ctrl-C discards what was typed.
            print()
            continue
        line = line.encode(errors="replace").decode().strip()
        if line:
            yield line


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise a KeyboardInterrupt in the block, whatever it does in other commands."""
    try:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
    except ValueError:
        # Only the main thread may.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

"""Ctrl-C and SIGTERM: the first one ends a command in order, the second one at once."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType

from rich.text import Text

from rayft.flow.console import terminal
from rayft.flow.hold import command_line

__all__ = ["Interrupts", "end_at_once", "interrupts"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The signals that this process got, each a KeyboardInterrupt in the main thread.

    Attributes:
        received: the first one; None if there was none.
        resume: the command that continues; the same command, where empty.
        installed: whether signals are handled here, which is so in a process that runs a command.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.resume = ""
        self.installed = False

    @property
    def status(self) -> int:
        """Return the exit status that shells give to a process that such a signal ends: 130 or 143."""
        return 128 + (self.received or signal.SIGINT)

    def install(self) -> None:
        """Handle the signals here from now on, if this is the main thread, which alone gets them."""
        if threading.current_thread() is threading.main_thread():
            self.installed = True
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def renew(self) -> None:
        """Handle SIGTERM here again, which Ray takes for itself when it starts, if it was handled here."""
        if self.installed:
            self.install()

    def forget(self) -> None:
        """Begin anew, for a process that outlives the command that was interrupted."""
        self.received, self.resume, self.installed = None, "", False

    def accept(self) -> None:
        """Take a signal for the regular end of a command that waits for one: nothing was interrupted."""
        self.received = None

    def show(self) -> None:
        """Print that the command was interrupted, and the command that continues."""
        terminal(stderr=True).print(
            Text.assemble(
                ("Interrupted", "bold red"),
                ": what is done is kept. Continue with: ",
                (self.resume or command_line(), "cyan"),
            ),
            soft_wrap=True,
        )

    def check(self) -> None:
        """Raise again what was received: code that Python calls back from C swallows exceptions.

        Raises:
            KeyboardInterrupt: if a signal was received.
        """
        if self.received is not None:
            raise KeyboardInterrupt

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            end_at_once(128 + number)
        self.received = signal.Signals(number)
        raise KeyboardInterrupt


def end_at_once(status: int) -> None:
    """End this process and what it has started: a Ray cluster on this machine, not one that was joined."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()
    os._exit(status)


interrupts = Interrupts()
"""Those of this process."""

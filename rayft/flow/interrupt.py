"""Handle Ctrl-C and SIGTERM: the first signal lets a command save and end, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from rich.text import Text

from rayft.flow.console import terminal
from rayft.flow.hold import command_line

__all__ = ["Interrupts", "end_at_once", "interrupts"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Turns the first SIGINT or SIGTERM into a KeyboardInterrupt in the main thread.

    Attributes:
        received: the signal; None if none was received.
        resume: the command that continues; empty if it is the same command.
        installed: whether signals are handled here, as in every process that runs a command.
        process: id of the process that handles them; processes that it forks inherit the handler.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.resume = ""
        self.installed = False
        self.process = os.getpid()

    @property
    def status(self) -> int:
        """Return the exit status that shells report for a process ended by that signal: 130 or 143."""
        return 128 + (self.received or signal.SIGINT)

    def install(self) -> None:
        """Start handling the signals. Does nothing outside of the main thread, which alone receives them."""
        if threading.current_thread() is threading.main_thread():
            self.installed, self.process = True, os.getpid()
            for number in SIGNALS:
                signal.signal(number, self._handle)

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Handle SIGTERM as before after a block that starts Ray, which replaces the handler.

        Ray's handler stays where neither a command nor the user's program handles the signal.
        """
        before = signal.getsignal(signal.SIGTERM)
        try:
            yield
        finally:
            if self.installed:
                self.install()
            elif callable(before) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)

    def forget(self) -> None:
        """Reset the state, for a process that goes on after an interrupted command."""
        self.received, self.resume, self.installed = None, "", False

    def wait(self) -> None:
        """Wait for a signal, which counts as the regular end of the waiting and not as an interrupt."""
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
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
        """Raise a received signal again, because callbacks that C code calls lose exceptions.

        Raises:
            KeyboardInterrupt: if a signal was received.
        """
        if self.received is not None:
            raise KeyboardInterrupt

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            # A library has forked this process, such as a pool that it ends by SIGTERM.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.received is not None:
            end_at_once(128 + number)
        self.received = signal.Signals(number)
        raise KeyboardInterrupt


def end_at_once(status: int) -> None:
    """End this process and all that it started. A local Ray cluster ends too, a joined one does not."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()
    os._exit(status)


interrupts = Interrupts()
"""The signal handling of this process."""

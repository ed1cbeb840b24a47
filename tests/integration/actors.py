"""The processes of Ray's actors, for tests that kill them."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil


def running(name: str) -> list[int]:
    """Return the actors whose class has a name in its own, in the cluster that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            title = "".join(process.cmdline()[:1])
            if title.startswith("ray::") and name in title:
                found.append(process.pid)
    return found


def pids(name: str) -> list[int]:
    """Find such actors, of which there must be some."""
    deadline = time.monotonic() + 10
    # An actor may be writing another title when it is asked for.
    while not (found := running(name)):
        assert time.monotonic() < deadline, f"no {name} runs"
        time.sleep(0.01)
    return found

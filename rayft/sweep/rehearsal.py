"""What a lane and the rehearsal of its command know of each other (`rayft.flow.rehearse`): a file.

The rehearsal holds the file's lock as long as it runs, and ends when the file is gone. This module imports
nothing that takes long to import.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress

__all__ = ["VARIABLE", "end_rehearsal"]

VARIABLE = "RAYFT_REHEARSAL"
"""Environment variable with the absolute path of the file, for all processes that a command starts on this
machine. If a user has set it to anything else, there are no rehearsals."""
WAIT_SECONDS = 5.0
"""How long a lane waits for the end of a rehearsal."""


def end_rehearsal() -> None:
    """End the rehearsal of this command on this machine, if there is one, and wait until it has ended.

    What follows may be timed on the GPU, or need all of its memory.
    """
    path = os.environ.get(VARIABLE, "")
    if not os.path.isabs(path):
        return
    # Without the file there is no rehearsal, or another lane has ended it.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.unlink(path)
            deadline = time.monotonic() + WAIT_SECONDS
            while time.monotonic() < deadline and not _free(descriptor):
                time.sleep(0.05)
        finally:
            os.close(descriptor)


def _free(descriptor: int) -> bool:
    """Return whether no process holds the lock of a file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

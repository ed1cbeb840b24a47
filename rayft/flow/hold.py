"""Lock an output folder, so that only one command at a time writes to it, and record which one."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rayft.errors import ConfigError
from rayft.files import locked, room_on
from rayft.paths import check_folder

__all__ = ["LOCK_FILE", "command_line", "hold"]

LOCK_FILE = ".lock"
"""File in an output folder that names the command which writes to it. The system holds the lock itself."""


@contextmanager
def hold(folder: Path, setting: str) -> Iterator[None]:
    """Lock an output folder for the length of a block.

    The folder is made if it is missing, and removed again if the block has written nothing to it. The system
    releases the lock when the process ends, in whatever way it ends.

    Args:
        folder: the folder, as an absolute path.
        setting: how a user sets the folder, for messages.

    Raises:
        ConfigError: if another process holds the folder; the message names that process.
        ResourceError: if the folder can't be written; DiskFullError if its disk becomes full in the block.
    """
    check_folder(folder, setting)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = folder / LOCK_FILE
    try:
        with room_on(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(lock, wait=0) as descriptor:
                if descriptor is None:
                    raise ConfigError(_refusal(folder, setting))
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_me()).encode(), 0)
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
    finally:
        for path in missing:
            # A folder that is not empty stays.
            with suppress(OSError):
                path.rmdir()


def command_line() -> str:
    """Return the command line of this process, as a user would write it."""
    program = Path(sys.argv[0])
    start = ["python", str(program)] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def _me() -> dict[str, str | int]:
    return {
        "command": command_line(),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _refusal(folder: Path, setting: str) -> str:
    try:
        who = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
        holder = "`{command}` (process {pid} on {host}, since {since})".format(**who)
    except (OSError, ValueError, KeyError):
        holder = "another process"
    return (
        f"{holder} is writing to {folder}; wait for it, end it, or choose another folder with {setting}. "
        "Nothing was changed"
    )

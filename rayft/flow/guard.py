"""End a command with one message, whatever happens. Imports nothing that takes long to import."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import sys
from collections.abc import Callable
from pathlib import Path

from rayft.errors import RayftError, ResourceError
from rayft.files import disk_full, disk_full_error
from rayft.flow.console import show_error
from rayft.flow.interrupt import interrupts
from rayft.flow.quiet import hide_known_lines
from rayft.models.files import cache_folder, hub_cache

__all__ = ["guarded"]

SYSTEM = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENODEV, errno.ENXIO, errno.EIO,
)  # fmt: skip
"""Error numbers of system calls that fail because of a path or a disk, not because of a fault in the code."""


def guarded(command: Callable[[], object]) -> None:
    """Run a command. An error that a user can correct ends it with one message and exit code 1, no traceback.

    This includes what the system refuses (a path, a full disk) and no check has found. Ctrl-C ends the
    command with exit code 130 and SIGTERM with 143, after it has saved its state.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Where the output's encoding lacks a character, its code is printed.
            stream.reconfigure(errors="backslashreplace")
    # While Python ends, it looks for reference cycles in all modules again and again, which takes a second.
    atexit.register(gc.freeze)
    hide_known_lines()
    interrupts.install()
    try:
        command()
    except (KeyboardInterrupt, SystemExit):
        # Typer turns a KeyboardInterrupt into an exit of its own.
        if interrupts.received is None:
            raise
        interrupts.show()
        sys.exit(interrupts.status)
    except Exception as error:
        if disk_full(error):
            _end(disk_full_error(error, *_written_to()))
        if isinstance(error, RayftError):
            _end(error)
        if not isinstance(error, OSError) or error.errno not in SYSTEM:
            raise
        what = f"{error.filename} can't be used" if error.filename else "the system refuses"
        _end(ResourceError(f"{what} ({error.strerror}); correct that path, or give this user rights to it"))


def _written_to() -> list[Path]:
    """Return the folders that a command may write to besides those that the user named."""
    from rayft.flow.cluster import temporary_folders

    return [Path.cwd(), hub_cache(), cache_folder(), *temporary_folders()]


def _end(error: RayftError) -> None:
    show_error(error)
    sys.exit(1)

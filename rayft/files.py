"""Files that are written whole or not at all, locks on files, and the error of a full disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rayft.errors import DiskFullError

__all__ = ["disk_full", "hash_content", "locked", "room_on", "sync_tree", "write_file"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXT = re.compile(
    r"os error (28|122)\b|no space left on device|disk quota exceeded|database or disk is full", re.IGNORECASE
)
"""How Rust, Arrow and SQLite say it, whose errors carry no errno."""


def write_file(path: Path, content: str | bytes) -> Path:
    """Write a small file so that a reader, and a restart after a crash, finds the old or the new content.

    The content is written beside the file and synced, then renamed to it; text is encoded as UTF-8.

    Returns:
        `path`.

    Raises:
        DiskFullError: if there is no space; the file stays as it was.
        OSError: if it can't be written for another reason.
    """
    data = content.encode() if isinstance(content, str) else content
    with room_on(path.parent, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            with staging.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
        except BaseException:
            with suppress(OSError):
                staging.unlink()
            raise
        _sync(path.parent)
    return path


def sync_tree(folder: Path) -> None:
    """Sync every file below a folder, and the folders, so that their content outlives a power cut.

    A folder that is filled, synced and then renamed to its place is there as a whole or not at all.
    """
    for place, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())
        _sync(Path(place))
    _sync(folder.parent)


def hash_content(path: Path) -> str:
    """Hash the content of a file (16 hex digits)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextmanager
def room_on(folder: Path, needed: int = 0) -> Iterator[None]:
    """Turn an error that means a full disk, whichever library raises it, into `DiskFullError`.

    Args:
        folder: where the block writes.
        needed: the bytes that it writes, as far as that is known.

    Raises:
        DiskFullError: naming the folder, the free space and the bytes needed.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not disk_full(error):
            raise
        raise DiskFullError(_message(folder, needed)) from error


def disk_full(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, means that a disk or a quota is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DiskFullError) or getattr(seen, "errno", None) in _FULL:
            return True
        if _FULL_TEXT.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def locked(path: Path, wait: float | None = None) -> Iterator[int | None]:
    """Hold the lock of a file, which is made if it is missing, for the length of a block.

    The system releases the lock when the process ends, however it ends.

    Args:
        path: the file.
        wait: seconds to wait for another holder; without end where not given.

    Yields:
        The file's descriptor; None if the time ran out.
    """
    deadline = None if wait is None else time.monotonic() + wait
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _lock(descriptor, deadline):
                yield None
                return
            # Whoever held the lock may have deleted the file: then this is the lock of nothing.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, deadline: float | None) -> bool:
    if deadline is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def _message(folder: Path, needed: int) -> str:
    there = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    wanted = f"{_size(needed)} needed, " if needed else ""
    return (
        f"the disk of {folder} is full ({wanted}{_size(free)} free); free some space and run the same "
        "command again: it continues from what is saved"
    )


def _size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _sync(folder: Path) -> None:
    """Sync a folder, so that a rename in it outlives a power cut; some file systems can't."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rayft.errors import DiskFullError, RayftError, TrackingError

__all__ = [
    "disk_full",
    "disk_full_error",
    "hash_content",
    "is_staged_file",
    "locked",
    "room_on",
    "sync_tree",
    "write_file",
]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXT = re.compile(
    r"os error (28|122)\b|no space left on device|disk quota exceeded|database or disk is full"
    r"|local disk is full|disk's utilization is over capacity",
    re.IGNORECASE,
)
"""How Rust, Arrow, SQLite and Ray say it, whose errors carry no errno."""
_STAGED = re.compile(r"\..+\.\d+-\d+")
"""Names that `write_file` gives to a file until it is written."""


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


def is_staged_file(path: Path) -> bool:
    """Return whether a path is a file that `write_file` had begun when its process was killed."""
    return _STAGED.fullmatch(path.name) is not None and path.is_file()


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
def room_on(folder: Path, needed: int = 0, *, others: Sequence[Path] = ()) -> Iterator[None]:
    """Turn an error that means a full disk, whichever library raises it, into `DiskFullError`.

    Args:
        folder: where the block writes.
        needed: the bytes that it writes, as far as that is known.
        others: where else it may write. The error names the one with the least space.

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
        raise disk_full_error(error, folder, *others, needed=needed) from error


def disk_full(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, means that a disk or a quota is full."""
    return any(
        isinstance(each, DiskFullError)
        or getattr(each, "errno", None) in _FULL
        # Our other errors quote, and may quote a server that speaks of its own disk.
        or (not isinstance(each, RayftError) and _FULL_TEXT.search(str(each)))
        for each in _chain(error)
    )


def disk_full_error(error: BaseException, *folders: Path, needed: int = 0) -> DiskFullError:
    """Make the `DiskFullError` of an error that means a full disk; return the one it was raised from, if any.

    Args:
        error: what a library raised.
        folders: where it may have written; the one with the least space is named, unless the error names a
            file itself.
        needed: the bytes that it writes, as far as that is known.
    """
    known = next((each for each in _chain(error) if isinstance(each, DiskFullError)), None)
    if known is not None:
        return known
    named = next((name for each in _chain(error) if (name := _written(each)) is not None), None)
    if named is None:
        folder = min(folders, key=lambda folder: _usage(folder).f_bavail)
    else:
        folder = next((folder for folder in folders if folder in named.parents), named.parent)
    return DiskFullError(_message(folder, needed, error))


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


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from, down to what a tracking server said."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        if isinstance(seen, TrackingError):
            return
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _written(error: BaseException) -> Path | None:
    """Return the file that an error of a full disk names as the one that it wrote."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return Path(error.args[0][0][1])
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return None
    # Of two files, a copy's or a renaming's, the second is the one that is written.
    name = error.filename2 or error.filename
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None


def _message(folder: Path, needed: int, error: BaseException) -> str:
    usage = _usage(folder)
    free = usage.f_bavail * usage.f_frsize
    wanted = f"{_size(needed)} needed, " if needed else ""
    what = f"the disk of {folder} is full ({wanted}{_size(free)} free)"
    chain = list(_chain(error))
    if any(getattr(each, "errno", None) == errno.EDQUOT or "quota" in str(each).lower() for each in chain):
        what = (
            f"this user's quota on the disk of {folder} is used up ({wanted}the disk has {_size(free)} free)"
        )
    elif usage.f_files and not usage.f_favail:
        what = f"the disk of {folder} can't hold more files (no inodes are free, {wanted}{_size(free)} are)"
    return f"{what}; free some space and run the same command again: it continues from what is saved"


def _usage(folder: Path) -> os.statvfs_result:
    there = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))
    return os.statvfs(there)


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

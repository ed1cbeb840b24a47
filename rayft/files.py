"""Write files whole or not at all, lock files, and recognise the errors of a full disk.

A lock holds between the processes of a machine. Whether it holds between machines that share a folder depends
on the file system: NFS 4 and GPFS pass locks on to all machines, Lustre and many others only if they are
mounted so. What several machines may make at the same time therefore has a sign of life as well: the maker
sets the time of a folder every few seconds (`kept_alive`), and the folder counts as abandoned after some
minutes without (`abandoned`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from rayft.errors import DiskFullError, RayftError, TrackingError

__all__ = [
    "ABANDONED_SECONDS",
    "abandoned",
    "disk_full",
    "disk_full_error",
    "hash_content",
    "is_staged_file",
    "kept_alive",
    "locked",
    "machine",
    "room_on",
    "sync_tree",
    "write_file",
    "write_large_file",
]

ALIVE_SECONDS = 10.0
"""Time between two signs of life of a folder that is being made."""
ABANDONED_SECONDS = 180.0
"""Time without a sign of life after which a folder counts as abandoned. Clients of NFS may see a time of
modification a minute late."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXT = re.compile(
    r"os error (28|122)\b|no space left on device|disk quota exceeded|database or disk is full"
    r"|local disk is full|disk's utilization is over capacity",
    re.IGNORECASE,
)
"""What Rust, Arrow, SQLite and Ray write when a disk is full. Their errors have no errno."""
_STAGED = re.compile(r"\..+\.\d+-\d+")
"""The names under which `write_file` writes a file before it renames it."""


def write_file(path: Path, content: str | bytes) -> Path:
    """Write a small file so that a reader always finds either the old or the new content, also after a crash.

    The content is written to a file beside it, synced, and renamed. Text is encoded as UTF-8.

    Returns:
        `path`.

    Raises:
        DiskFullError: if there is no space; the file keeps its old content.
        OSError: if the file can't be written for another reason.
    """
    data = content.encode() if isinstance(content, str) else content
    return write_large_file(path, lambda staging: staging.write_bytes(data), len(data))


def write_large_file(path: Path, write: Callable[[Path], object], needed: int = 0) -> Path:
    """Let `write` write a file, and rename it to `path` once it is whole. If that fails, `path` stays.

    Args:
        path: the file.
        write: called with the path to write to, beside `path`.
        needed: how many bytes it writes, for the message of a full disk.

    Returns:
        `path`.

    Raises:
        DiskFullError: if there is no space.
        OSError: if the file can't be written for another reason.
    """
    with room_on(path.parent, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = f"{machine()}.{os.getpid()}-{threading.get_ident()}"
        staging = path.with_name(f".{path.name}.{writer}")
        try:
            write(staging)
            with staging.open("rb") as file:
                os.fsync(file.fileno())
            staging.replace(path)
        except BaseException:
            with suppress(OSError):
                staging.unlink()
            raise
        _sync(path.parent)
    return path


def is_staged_file(path: Path) -> bool:
    """Return whether a path is a file that `write_file` left unfinished, because its process was killed."""
    return _STAGED.fullmatch(path.name) is not None and path.is_file()


def sync_tree(folder: Path) -> None:
    """Sync every file below a folder, and the folders, so that their content survives a power cut.

    A folder that is filled, synced and then renamed to its final place is found there complete or not at all.
    """
    for place, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())
        _sync(Path(place))
    _sync(folder.parent)


def hash_content(path: Path) -> str:
    """Return a hash of the content of a file (16 hex digits)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextmanager
def room_on(folder: Path, needed: int = 0, *, others: Sequence[Path] = ()) -> Iterator[None]:
    """Turn any library's error about a full disk, raised in the block, into `DiskFullError`.

    Args:
        folder: the folder that the block writes to.
        needed: number of bytes that it writes, 0 if that is not known.
        others: other folders that it may write to. The error names the folder with the least space.

    Raises:
        DiskFullError: with the folder, the free space and the number of bytes needed.
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
    """Return whether an error, or an error that caused it, means that a disk or a quota is full."""
    return any(
        isinstance(each, DiskFullError)
        or getattr(each, "errno", None) in _FULL
        # Our other errors quote messages, possibly those of a server about its own disk.
        or (not isinstance(each, RayftError) and _FULL_TEXT.search(str(each)))
        for each in _chain(error)
    )


def disk_full_error(error: BaseException, *folders: Path, needed: int = 0) -> DiskFullError:
    """Return the `DiskFullError` for an error about a full disk: its cause if that is one, else a new one.

    Args:
        error: the error that a library raised.
        folders: the folders that it may have written to. The message names the one with the least space,
            unless the error itself names a file.
        needed: number of bytes to write, 0 if that is not known.
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
    """Hold the lock of a file for the length of a block. The file is created if it is missing.

    The system releases the lock when the process ends, even if it is killed. Other machines that share the
    file may not see the lock; see the description of this module.

    Args:
        path: the file.
        wait: seconds to wait for another holder; None waits forever.

    Yields:
        The descriptor of the file, or None if the time ran out.
    """
    deadline = None if wait is None else time.monotonic() + wait
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _lock(descriptor, deadline):
                yield None
                return
            # The last holder may have deleted the file. Then this lock is of a file that nobody else opens.
            if _opens(path, descriptor):
                yield descriptor
                return
        finally:
            os.close(descriptor)


@cache
def machine() -> str:
    """Return an identifier of this machine since it was started (8 hex digits).

    Containers of a machine, which may see each other's locks, have the same; machines of the same name don't.
    """
    try:
        known = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        known = platform.node().encode()
    return hashlib.sha256(known).hexdigest()[:8]


@contextmanager
def kept_alive(folder: Path) -> Iterator[None]:
    """Show other machines in the block, by the folder's time of modification, that this process is alive."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(ALIVE_SECONDS):
            with suppress(OSError):
                os.utime(folder)

    thread = threading.Thread(target=beat, name="rayft-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def abandoned(folder: Path) -> bool:
    """Return whether a folder has shown no sign of life for so long that its maker must have ended.

    Raises:
        FileNotFoundError: if the folder is missing.
        OSError: if nothing can be written beside the folder.
    """
    # By the clock of the disk: that of a file server may differ from this machine's.
    with tempfile.TemporaryFile(dir=folder.parent) as now:
        return os.fstat(now.fileno()).st_mtime - folder.stat().st_mtime > ABANDONED_SECONDS


def _opens(path: Path, descriptor: int) -> bool:
    """Return whether a path still names the file of a descriptor."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


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
    """Yield an error and its causes. Causes of a `TrackingError` are skipped: a server's disk is not ours."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        if isinstance(seen, TrackingError):
            return
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _written(error: BaseException) -> Path | None:
    """Return the file that an error about a full disk names as the one being written."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return Path(error.args[0][0][1])
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return None
    # A copy or a renaming names two files; the second one is written.
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
    """Sync a folder, so that a rename in it survives a power cut. Some file systems don't support that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

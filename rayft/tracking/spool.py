"""A write-ahead log of records for a server: one file of JSON lines for each run and writing process.

    <run>.<host>-<pid>.jsonl   records, appended whole before anything is sent
    <same>.jsonl.sent          inode and byte offset up to which they were delivered; a sender holds its lock
    rejected.log               records that the server refused for good, each with the reason

A record is delivered at least once: after a crash the last batch is sent again, so the receiver must ignore
repeats. Files are listed in the order in which they were begun (by the `time` of their first record), so that
the records of a killed process are delivered before those of its successor. Appended records survive
`kill -9`, since the kernel has them, but not a power cut.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.errors import ResourceError
from rayft.files import locked, room_on

__all__ = ["Drained", "Record", "Spool", "UndeliveredError", "slug"]

Record = Mapping[str, Any]
Deliver = Callable[[Sequence[Record]], Sequence[tuple[Record, str]]]
"""Sends records in order, and returns those that were refused for good, each with the reason."""

_BATCH = 500


class UndeliveredError(Exception):
    """The receiver is away. The records stay in the spool.

    Attributes:
        full: whether the receiver is on this machine and its disk is full.
    """

    def __init__(self, message: str = "", *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


@dataclass(frozen=True)
class Drained:
    """The result of draining one or more files."""

    sent: int = 0
    """Number of records that were delivered."""
    pending: int = 0
    """Number of records that still have to be delivered."""
    rejected: int = 0
    """Number of records that were refused for good; they are in rejected.log."""
    reason: str = ""
    """Why records are pending, if it was tried to deliver them."""

    def __add__(self, other: Drained) -> Drained:
        return Drained(
            self.sent + other.sent,
            self.pending + other.pending,
            self.rejected + other.rejected,
            self.reason or other.reason,
        )


class Spool:
    """The files of one folder. Any number of processes may append and drain at the same time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, run: str) -> Path:
        """Return this process's file of a run."""
        return self.folder / f"{slug(run)}.{socket.gethostname()}-{os.getpid()}.jsonl"

    def append(self, run: str, record: Record) -> None:
        """Append a record to this process's file of a run.

        Raises:
            DiskFullError: if there is no space; the file keeps its whole records.
            ResourceError: if the file cannot be written for another reason.
        """
        text = json.dumps(record)
        with room_on(self.folder, len(text)):
            _append(self.path(run), text)

    def files(self, *runs: str) -> list[Path]:
        """Return the files of all processes, the oldest first.

        Args:
            runs: the runs whose files are returned; all runs by default.
        """
        patterns = [f"{slug(run)}.*.jsonl" for run in runs] or ["*.jsonl"]
        found = {path for pattern in patterns for path in self.folder.glob(pattern)}
        return sorted(found, key=lambda path: (_begun(path), path.name))

    def drain(self, path: Path, deliver: Deliver, *, wait: float = 0.0, remove: bool = False) -> Drained:
        """Deliver the pending records of a file.

        Args:
            path: one of `files()`.
            deliver: sends a batch, and raises `UndeliveredError` if the receiver is away.
            wait: seconds to wait for another sender of the file.
            remove: whether to delete the file once all records are delivered.

        Raises:
            DiskFullError: if the disk of the spool is full.
        """
        done = Drained()
        with room_on(self.folder), locked(_sidecar(path), wait) as lock:
            if lock is None:
                return Drained(pending=self.pending(path))
            while path.exists():
                offset = _offset(_sidecar(path), path)
                lines, end, inode = _read(path, offset)
                if not lines and not (remove and _remove_or_close_tail(path, offset, lock)):
                    break
                try:
                    done += self._deliver(lines, deliver)
                except UndeliveredError as error:
                    return done + Drained(pending=self.pending(path), reason=str(error))
                if lines:
                    # Someone may have deleted the file meanwhile.
                    _record(lock, inode, end)
            if not path.exists():
                _sidecar(path).unlink(missing_ok=True)
        return done

    def pending(self, path: Path) -> int:
        """Return the number of records of a file that were not delivered."""
        count, offset = 0, _offset(_sidecar(path), path)
        while True:
            lines, offset, _ = _read(path, offset)
            if not lines:
                return count
            count += len(lines)

    def _deliver(self, lines: Sequence[bytes], deliver: Deliver) -> Drained:
        records: list[Record] = []
        refused: list[tuple[Record, str]] = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                refused.append(({"line": line.decode(errors="replace")}, "cut off by a crash"))
        refused += deliver(records) if records else ()
        for record, reason in refused:
            _append(self.folder / "rejected.log", json.dumps({"reason": reason, **record}))
        return Drained(sent=len(lines) - len(refused), rejected=len(refused))


def slug(run: str) -> str:
    """Return the first part of the file names of a run, which differs between any two runs."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", run)[:80]
    return f"{readable}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"


def _begun(path: Path) -> int:
    """Return the time of a file's first record, or 0 if it has none."""
    try:
        with path.open("rb") as file:
            return int(json.loads(file.readline())["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _append(path: Path, text: str) -> None:
    with locked(path) as descriptor:
        assert descriptor is not None
        size = os.lseek(descriptor, 0, os.SEEK_END)
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = (b"\n" if torn else b"") + text.encode() + b"\n"
        try:
            written = os.write(descriptor, data)
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise ResourceError(f"{path} cannot be written ({error.strerror})") from error
        if written != len(data):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sent")


def _record(sidecar: int, inode: int, offset: int) -> None:
    os.pwrite(sidecar, f"{inode} {offset}".encode().ljust(48), 0)


def _offset(sidecar: Path, path: Path) -> int:
    try:
        inode, offset = sidecar.read_text(encoding="utf-8").split()
        return int(offset) if int(inode) == path.stat().st_ino else 0
    except (OSError, ValueError):
        return 0


def _read(path: Path, offset: int) -> tuple[list[bytes], int, int]:
    """Read whole lines from an offset on, and return them, where they end, and the file's inode.

    A line without its end is still being written.
    """
    lines: list[bytes] = []
    try:
        with path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n") or len(lines) == _BATCH:
                    break
                lines.append(line)
                offset += len(line)
    except FileNotFoundError:
        return [], offset, 0
    return lines, offset, inode


def _remove_or_close_tail(path: Path, offset: int, sidecar: int) -> bool:
    """Delete a file that was delivered to its end.

    If its last line is torn, end that line instead, and return True: there is one more line to deliver. If it
    is shorter than that, return True too: what it has is to be delivered.

    Args:
        path: the file.
        offset: up to where it was delivered.
        sidecar: the descriptor of its sidecar, whose lock is held. The sidecar stays, since a second sender
            that could lock a new one would still find the file.
    """
    with locked(path) as descriptor:
        assert descriptor is not None
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size == offset:
            # The offset goes first: a crash in between causes a repeat. The other order could cause a loss,
            # since the next file may get the same inode.
            _record(sidecar, 0, 0)
            path.unlink()
            return False
        if size < offset:
            # Someone has cut it, or deleted it and opening it here has made a new one.
            _record(sidecar, 0, 0)
            return True
        # Writers hold this lock while they append, so the writer of a line without an end is gone.
        if os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
        return True

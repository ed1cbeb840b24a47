"""A write-ahead log of what has to reach a server: one file of JSON lines a run and writer.

    <run>.<host>-<pid>.jsonl   records, appended whole before anything is sent
    <same>.jsonl.sent          inode and byte offset up to which they were delivered; its lock says who sends
    rejected.log               records that the server refused for good, each with the reason

A record is delivered at least once: after a crash the last batch is sent again, so the receiver
must ignore repeats. Files are listed in the order in which they were begun (by the `time` of their first
record), so that what a killed process left of a run is delivered before what its successor wrote.
Appended records outlive `kill -9` (they are the kernel's), not a power cut.
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
"""Sends records in order; gives those refused for good, with the reason."""

_BATCH = 500


class UndeliveredError(Exception):
    """The receiver is away: what was to be delivered stays in the spool.

    Attributes:
        full: whether it is here, and its disk is full.
    """

    def __init__(self, message: str = "", *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


@dataclass(frozen=True)
class Drained:
    """What happened to the records of one or more files."""

    sent: int = 0
    """Records delivered now."""
    pending: int = 0
    """Records that are still to be delivered."""
    rejected: int = 0
    """Records refused for good; they are in rejected.log."""
    reason: str = ""
    """Why something is pending, if it was tried."""

    def __add__(self, other: Drained) -> Drained:
        return Drained(
            self.sent + other.sent,
            self.pending + other.pending,
            self.rejected + other.rejected,
            self.reason or other.reason,
        )


class Spool:
    """The files of one folder. Any number of processes append, and drain, at once."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, run: str) -> Path:
        """Name this process's file of a run."""
        return self.folder / f"{slug(run)}.{socket.gethostname()}-{os.getpid()}.jsonl"

    def append(self, run: str, record: Record) -> None:
        """Write a record down before anything is sent.

        Raises:
            DiskFullError: if there is no space; the file stays whole.
            ResourceError: if it can't be written for another reason.
        """
        text = json.dumps(record)
        with room_on(self.folder, len(text)):
            _append(self.path(run), text)

    def files(self, *runs: str) -> list[Path]:
        """List every process's files, the oldest first.

        Args:
            runs: the runs whose files are listed; all where none is given.
        """
        patterns = [f"{slug(run)}.*.jsonl" for run in runs] or ["*.jsonl"]
        found = {path for pattern in patterns for path in self.folder.glob(pattern)}
        return sorted(found, key=lambda path: (_begun(path), path.name))

    def drain(self, path: Path, deliver: Deliver, *, wait: float = 0.0, remove: bool = False) -> Drained:
        """Deliver what is left in a file.

        Args:
            path: one of `files()`.
            deliver: sends a batch; raises `UndeliveredError` if the receiver is away.
            wait: seconds to wait for another sender of the file.
            remove: delete the file once everything is delivered.

        Raises:
            DiskFullError: if the spool's own disk is full.
        """
        done = Drained()
        with room_on(self.folder), locked(_sidecar(path), wait) as lock:
            if lock is None:
                return Drained(pending=self.pending(path))
            while path.exists():
                offset = _offset(_sidecar(path), path)
                lines, end = _read(path, offset)
                if not lines and not (remove and _remove_or_close_tail(path, offset)):
                    break
                try:
                    done += self._deliver(lines, deliver)
                except UndeliveredError as error:
                    return done + Drained(pending=self.pending(path), reason=str(error))
                if lines:
                    text = f"{path.stat().st_ino} {end}".encode().ljust(48)
                    os.pwrite(lock, text, 0)
            if not path.exists():
                _sidecar(path).unlink(missing_ok=True)
        return done

    def pending(self, path: Path) -> int:
        """Count the records of a file that were not delivered."""
        count, offset = 0, _offset(_sidecar(path), path)
        while True:
            lines, offset = _read(path, offset)
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
    """Return a name for files of a run, which differs between any two runs."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", run)[:80]
    return f"{readable}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"


def _begun(path: Path) -> int:
    """Return the time of a file's first record; 0 where it has none."""
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
            raise ResourceError(f"{path} can't be written ({error.strerror})") from error
        if written != len(data):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sent")


def _offset(sidecar: Path, path: Path) -> int:
    try:
        inode, offset = sidecar.read_text(encoding="utf-8").split()
        return int(offset) if int(inode) == path.stat().st_ino else 0
    except (OSError, ValueError):
        return 0


def _read(path: Path, offset: int) -> tuple[list[bytes], int]:
    """Read whole lines from an offset on; a line without its end is still being written."""
    lines: list[bytes] = []
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n") or len(lines) == _BATCH:
                    break
                lines.append(line)
                offset += len(line)
    except FileNotFoundError:
        return [], offset
    return lines, offset


def _remove_or_close_tail(path: Path, offset: int) -> bool:
    """Delete a file that is delivered to its end; give True if a torn last line was closed instead."""
    with locked(path) as descriptor:
        assert descriptor is not None
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size == offset:
            # The sidecar goes first: a crash in between means a repeat, the other way round a loss.
            _sidecar(path).unlink(missing_ok=True)
            path.unlink()
            return False
        # Appending holds this lock, so a line without an end has no writer any more.
        if os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
        return True

"""The server's own copies of the adapters that it serves, and its record of what it serves.

Whoever owns an adapter's folder may delete it, cut it short or write another adapter into it while it is
served. The director therefore copies an adapter when it is loaded, and replicas read only the copy: a replica
that starts later, or that reads an evicted adapter again, serves what was loaded. The copies are no hard
links, because a file that is overwritten in place changes under all of its names.

A replica on a node that does not share the director's disk receives a copy from the director (`transfer`) and
keeps it below the same path on its own node.

    <fetched>/served-<server>/
        served.json       the record, from which a director that replaces another one goes on
        <content>/        a copy

Unloaded adapters' copies are deleted, and the whole folder when the server ends, on each node. A server that
was killed leaves its folder behind; the next one that starts on that node deletes it once it has not been
touched for a day.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

from pydantic import TypeAdapter

from rayft.artifacts import WEIGHTS_FILE, settle
from rayft.errors import ArtifactError, ResourceError
from rayft.files import locked, room_on, write_file
from rayft.paths import check_folder
from rayft.serving.control.admission import read_adapter
from rayft.serving.control.allowed import FILES
from rayft.serving.control.state import Served

__all__ = ["STALE_SECONDS", "TOUCH_SECONDS", "Copies", "Record", "holds"]

logger = logging.getLogger("ray.serve")

PREFIX = "served-"
RECORD = "served.json"
TOUCH_SECONDS = 3600.0
"""How often a server marks its folder as in use."""
STALE_SECONDS = 24 * TOUCH_SECONDS
"""Age of the mark from which a folder counts as left behind."""


@dataclass(frozen=True)
class Record:
    """What a director needs to go on where another one was lost."""

    served: Served
    """What is served, from the server's copies."""
    wanted: Mapping[str, str] | None = None
    """The adapters of the last `user_config` that was applied."""
    base: str = ""
    """Fingerprint of the base that the replicas serve; empty until the first one has started."""


_RECORDS: TypeAdapter[Record] = TypeAdapter(Record)


class Copies:
    """The folder of one server."""

    def __init__(self, fetched: str | Path, server: str) -> None:
        self._fetched = Path(fetched).expanduser().absolute()
        self._folder = self._fetched / f"{PREFIX}{server}"

    def take(self, folder: Path, content: str) -> Path:
        """Copy an adapter's files, unless they are here already, and return the folder of the copy.

        Args:
            folder: an adapter folder that was read and checked.
            content: the content hash that it had then.

        Raises:
            ArtifactError: if the folder holds another content by now.
            DiskFullError: if there is no space for the copy.
            ResourceError: if it can't be written for another reason.
        """
        check_folder(self._fetched, "fetched")
        self._folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".copy-", dir=self._folder))
        try:
            self._copy(folder, staging)
            target = self._folder / f"{content}-{_digest(staging)}"
            if holds(target, content):
                return target
            if not holds(staging, content):
                raise ArtifactError(f"{folder} changed while it was read; load it again")
            shutil.rmtree(target, ignore_errors=True)
            if not settle(staging, target):
                raise ResourceError(f"{target} can't be written; free it or give another folder (fetched)")
            return target
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def keep(self, folders: Collection[str]) -> list[str]:
        """Delete all copies but these, and return the names of those that were deleted."""
        names = {Path(folder).name for folder in folders}
        found = [path for path in self._folder.iterdir() if path.is_dir()] if self._folder.is_dir() else []
        others = [path.name for path in found if path.name not in names]
        self.drop(others)
        return others

    def drop(self, names: Iterable[str]) -> None:
        """Delete the copies with these names."""
        for name in names:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def sizes(self, name: str, content: str) -> dict[str, int]:
        """Return the sizes of a copy's files, once the copy is found to be whole.

        Args:
            name: name of the copy's folder.
            content: the content hash that it must have.

        Raises:
            ArtifactError: if it is missing or damaged.
        """
        folder = self._folder / name
        found = read_adapter(folder).content_hash
        if found != content:
            raise ArtifactError(f"{folder} holds {found}, not {content}; load the adapter again")
        return {path.name: path.stat().st_size for path in folder.iterdir() if path.name in FILES}

    def part(self, name: str, file: str, offset: int, size: int) -> bytes:
        """Read a part of one of a copy's files.

        Raises:
            ArtifactError: if it can't be read.
        """
        try:
            with (self._folder / name / file).open("rb") as opened:
                opened.seek(offset)
                return opened.read(size)
        except OSError as error:
            raise ArtifactError(f"{self._folder / name} can't be read: {error.strerror}") from error

    @contextmanager
    def receiving(self, size: int) -> Iterator[Path]:
        """Yield an empty folder that a copy's files are written into before `put` gives it its place.

        Args:
            size: bytes that will be written.

        Raises:
            DiskFullError: if there is no space for them.
            ResourceError: if they can't be written for another reason.
        """
        check_folder(self._fetched, "fetched")
        try:
            with room_on(self._fetched, size):
                self._folder.mkdir(parents=True, exist_ok=True)
                staging = Path(tempfile.mkdtemp(prefix=".receive-", dir=self._folder))
                try:
                    yield staging
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
        except OSError as error:
            raise ResourceError(
                f"{self._folder} can't be written on {gethostname()} ({error.strerror}); correct that, or "
                "give another folder (fetched)"
            ) from error

    def put(self, staging: Path, name: str, content: str) -> None:
        """Put a received copy in its place, unless another replica on this node has put a whole one there.

        Args:
            staging: the folder with its files.
            name: name of the copy's folder.
            content: the content hash that it must have.

        Raises:
            ResourceError: if it can't be put there.
        """
        target = self._folder / name
        with locked(self._folder / f".{name}.lock"):
            if not holds(target, content):
                shutil.rmtree(target, ignore_errors=True)
                if not settle(staging, target):
                    raise ResourceError(f"{target} can't be written; free it")

    def save(self, record: Record) -> None:
        """Write the record.

        Raises:
            DiskFullError, ResourceError: if it can't be written; the one before stays.
        """
        try:
            write_file(self._folder / RECORD, _RECORDS.dump_json(record))
        except OSError as error:
            raise ResourceError(
                f"{self._folder} can't be written ({error.strerror}); make it writable, or give another "
                "folder (fetched)"
            ) from error

    def record(self) -> Record | None:
        """Read the record; None if there is none that can be read."""
        try:
            return _RECORDS.validate_json((self._folder / RECORD).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s can't be read, the configuration is used: %s", self._folder / RECORD, error)
            return None

    def touch(self) -> None:
        """Mark the folder as in use."""
        with suppress(OSError):
            os.utime(self._folder)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def remove_stale(self) -> None:
        """Delete the folders that killed servers left behind."""
        for path in self._fetched.glob(f"{PREFIX}*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)

    def _copy(self, folder: Path, staging: Path) -> None:
        sources = [source for name in FILES if (source := folder / name).is_file()]
        try:
            with room_on(self._folder, sum(source.stat().st_size for source in sources)):
                for source in sources:
                    shutil.copyfile(source, staging / source.name)
        except OSError as error:
            raise ResourceError(
                f"{folder} can't be copied to {self._folder} ({error.strerror}); correct that, then load it "
                "again"
            ) from error


def holds(folder: Path, content: str) -> bool:
    """Return whether a folder holds an adapter with this content hash."""
    try:
        return read_adapter(folder).content_hash == content
    except ArtifactError:
        return False


def _digest(folder: Path) -> str:
    """Hash what the content hash leaves out: adapters of equal factors may have other metadata."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != WEIGHTS_FILE:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]

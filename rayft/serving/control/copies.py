"""The server's own copies of the adapters that it serves, and its record of what it serves.

The owner of an adapter's folder may delete it, truncate its files or write another adapter into it while the
adapter is served. The director therefore copies an adapter when it is loaded, and replicas read only the
copy: a replica that starts later, or that reads an evicted adapter again, serves what was loaded. The copies
are not hard links, because a file that is overwritten in place changes under all of its names.

A replica on a node that does not share the director's disk receives a copy from the director (`transfer`) and
keeps it below the same path on its own node.

    <fetched>/served-<server>/
        served.json       the record, with which a director that replaces a lost one continues
        <content>/        a copy

The copy of an adapter is deleted when the adapter is unloaded, and the whole folder when the server ends, on
each node. A server that was killed leaves its folder behind. A server that starts later on that node deletes
the folder if its time of modification is more than a day old.
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

from rayft.artifacts import WEIGHTS_FILE, AdapterArtifact, holds, settle
from rayft.errors import ArtifactError, ResourceError
from rayft.files import locked, room_on, write_file
from rayft.paths import check_folder
from rayft.serving.control.allowed import FILES
from rayft.serving.control.state import Served

__all__ = ["STALE_SECONDS", "TOUCH_SECONDS", "Copies", "Record"]

logger = logging.getLogger("ray.serve")

PREFIX = "served-"
RECORD = "served.json"
TOUCH_SECONDS = 3600.0
"""Interval at which a running server updates its folder's time of modification."""
STALE_SECONDS = 24 * TOUCH_SECONDS
"""Age of that time from which a folder counts as left behind."""


@dataclass(frozen=True)
class Record:
    """The state with which a director continues after another one was lost."""

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
        """Copy an adapter's files, unless there is a copy already, and return the folder of the copy.

        Args:
            folder: an adapter folder that was read and checked.
            content: its content hash at that time.

        Raises:
            ArtifactError: if the content of the folder has changed since.
            DiskFullError: if there is no space for the copy.
            ResourceError: if the copy can't be written for another reason.
        """
        with self.staging() as staging:
            self._copy(folder, staging)
            target = self._folder / f"{content}-{_digest(staging)}"
            if holds(target, content):
                return target
            if not holds(staging, content):
                raise ArtifactError(f"{folder} changed while it was read; load it again")
            if not settle(staging, target):
                raise ResourceError(
                    f"{target} can't be written; remove what is there, or set another folder (fetched)"
                )
            return target

    def keep(self, folders: Collection[str]) -> list[str]:
        """Delete all copies except these, and return the names of the deleted ones."""
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
        """Check that a copy is complete, and return the sizes of its files.

        Args:
            name: name of the copy's folder.
            content: the content hash that it must have.

        Returns:
            Name of a file → its size in bytes.

        Raises:
            ArtifactError: if the copy is missing or damaged.
        """
        folder = self._folder / name
        found = AdapterArtifact.load(folder).content_hash
        if found != content:
            raise ArtifactError(f"{folder} has the content {found}, not {content}; load the adapter again")
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
    def staging(self, size: int = 0) -> Iterator[Path]:
        """Yield an empty folder for the files of a copy, which is deleted unless the block moves it.

        Args:
            size: number of bytes that will be written, 0 if that is not known.

        Raises:
            DiskFullError: if there is no space for them.
            ResourceError: if they can't be written for another reason.
        """
        check_folder(self._fetched, "fetched")
        try:
            with room_on(self._fetched, size):
                self._folder.mkdir(parents=True, exist_ok=True)
                staging = Path(tempfile.mkdtemp(prefix=".copy-", dir=self._folder))
                try:
                    yield staging
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
        except OSError as error:
            raise ResourceError(
                f"{self._folder} can't be written on {gethostname()} ({error.strerror}); make it writable, "
                "or set another folder (fetched)"
            ) from error

    def put(self, staging: Path, name: str, content: str) -> None:
        """Move a received copy into place, unless another replica of this node has done so.

        Args:
            staging: the folder with the files.
            name: name of the copy's folder.
            content: the content hash that it must have.

        Raises:
            ResourceError: if it can't be moved there.
        """
        target = self._folder / name
        with locked(self._folder / f".{name}.lock"):
            if not holds(target, content) and not settle(staging, target):
                raise ResourceError(f"{target} can't be written; remove what is there")

    def save(self, record: Record) -> None:
        """Write the record.

        Raises:
            DiskFullError, ResourceError: if it can't be written; the previous record remains.
        """
        try:
            write_file(self._folder / RECORD, _RECORDS.dump_json(record))
        except OSError as error:
            raise ResourceError(
                f"{self._folder} can't be written ({error.strerror}); make it writable, or set another "
                "folder (fetched)"
            ) from error

    def record(self) -> Record | None:
        """Return the record; None if there is none, or it can't be read."""
        try:
            return _RECORDS.validate_json((self._folder / RECORD).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning(
                "%s can't be read; the adapters of the configuration are served: %s",
                self._folder / RECORD,
                error,
            )
            return None

    def touch(self) -> None:
        """Update the folder's time of modification, which marks it as in use."""
        with suppress(OSError):
            os.utime(self._folder)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def remove_stale(self) -> None:
        """Delete the folders that killed servers have left behind."""
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
                f"{folder} can't be copied to {self._folder} ({error.strerror}); correct that, then load the "
                "adapter again"
            ) from error


def _digest(folder: Path) -> str:
    """Hash all files but the weights: adapters with equal factors may have different metadata."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != WEIGHTS_FILE:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]

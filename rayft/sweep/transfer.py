"""Transfer files between the home, the node on which a command runs, and lanes on nodes with other disks.

Only the files at home count. A lane on another disk reads copies, which it fetches when it needs them, and
writes into a folder of its own. Checkpoints, adapters and results are sent home before they are reported, so
a trial whose node is lost continues on another node. All files travel through Ray's object store in parts of
`PART` bytes.

    <cache>/lanes/<lane>-<node>/copies/<job>/…   files that the lane reads
    <cache>/lanes/<lane>-<node>/made/<path>      files that it writes, under the path that they have at home
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from rayft.files import locked, machine, room_on, sync_tree
from rayft.models.files import cache_folder
from rayft.sweep.settings import HomeNode
from rayft.train.home import Home

__all__ = ["FileHost", "RemoteHome", "find_home"]

PART = 2**25
"""Bytes that are transferred in one call."""
STALE_SECONDS = 600.0
"""Time without a sign of life after which the folder of a lane counts as abandoned."""


class FileHost:
    """An actor on the home's node that reads and writes files for lanes on other disks."""

    def files(self, path: str) -> dict[str, int] | None:
        """Return the files at a path: name relative to the path → bytes; None if nothing is there.

        If the path itself is a file, its relative name is empty.
        """
        top = Path(path)
        if top.is_file():
            return {"": top.stat().st_size}
        if not top.is_dir():
            return None
        found = (one for one in top.rglob("*") if one.is_file())
        return {str(one.relative_to(top)): one.stat().st_size for one in found}

    def read(self, path: str, start: int) -> bytes:
        """Return the part of a file that begins at a byte."""
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(PART)

    def begin(self, target: str) -> str:
        """Create a folder beside a target; `settle` moves its files to the target once all have arrived."""
        above = Path(target).parent
        with room_on(above):
            above.mkdir(parents=True, exist_ok=True)
            # Named like the folders of `write_whole`, so the next command deletes what a killed lane has
            # left.
            staging = Path(tempfile.mkdtemp(prefix=f".{Path(target).name}-", dir=above)) / "new"
            staging.mkdir()
            return str(staging)

    def append(self, path: str, part: bytes) -> None:
        """Append a part to a file."""
        with room_on(Path(path).parent, len(part)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                file.write(part)

    def settle(self, staging: str, target: str) -> None:
        """Move the files of a folder from `begin` to the target, beside what other nodes have sent."""
        with room_on(Path(target).parent):
            sync_tree(Path(staging))
            goal = Path(target)
            goal.mkdir(parents=True, exist_ok=True)
            for one in sorted(path for path in Path(staging).rglob("*") if path.is_file()):
                end = goal / one.relative_to(staging)
                end.parent.mkdir(parents=True, exist_ok=True)
                one.replace(end)
            sync_tree(goal)
        shutil.rmtree(Path(staging).parent, ignore_errors=True)

    def do(self, verb: str, path: str, *arguments: Any) -> None:
        """Call a method of `Home` at home: check, commit, prune, remove or write."""
        getattr(Home(), verb)(Path(path), *arguments)


class RemoteHome(Home):
    """Access for workers that do not see the home's disk.

    All workers of a lane on one node share a folder. A file that several of them ask for is fetched once.

    Args:
        host: handle of the `FileHost`.
        lane: identifies this start of the lane; the same on all its workers.
    """

    seen = False

    def __init__(self, host: Any, lane: str) -> None:
        self._host = host
        above = cache_folder() / "lanes"
        _remove_stale(above)
        # Nodes may share the cache, but not its locks.
        self._root = above / f"{lane}-{machine()}"
        self._made = self._root / "made"
        self._made.mkdir(parents=True, exist_ok=True)
        self._scope = "lane"

    def alive(self) -> None:
        """Mark this lane's folder as in use."""
        with suppress(OSError):
            os.utime(self._root)

    def close(self) -> None:
        """Delete this lane's folder."""
        shutil.rmtree(self._root, ignore_errors=True)

    @contextmanager
    def within(self, scope: str) -> Iterator[None]:
        """Assign the copies that the block fetches to a scope; `drop` deletes the copies of a scope."""
        before, self._scope = self._scope, scope
        try:
            yield
        finally:
            self._scope = before

    def drop(self, scope: str) -> None:
        """Delete the copies that were fetched within a scope."""
        shutil.rmtree(self._root / "copies" / scope, ignore_errors=True)

    def local(self, path: str | Path) -> Path:
        """Return this node's copy of a file or folder, or the path itself if it exists on this node."""
        path = Path(path)
        if path.exists() or not path.is_absolute():
            return path
        name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        copy = self._root / "copies" / self._scope / name / path.name
        return copy if self._fetch(path, copy) else path

    def place(self, folder: Path) -> Path:
        """Return the folder in which this node writes the files of a folder of the home."""
        return self._made / folder.relative_to("/")

    def check(self, folder: Path) -> None:
        """Refuse a folder of the home to which no adapter can be written."""
        self._do("check", folder)

    def bring(self, place: Path) -> None:
        """Fetch the files that the home has for a folder."""
        self._fetch(self._home(place), place)

    def send(self, place: Path, *, keep: bool = False) -> None:
        """Send a folder's files home, and delete them on this node unless they are kept."""
        with locked(_lock(place)):
            files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else []
            if not files:
                return
            target = str(self._home(place))
            staging = ray.get(self._host.begin.remote(target))
            for path in files:
                end = str(Path(staging) / path.relative_to(place))
                for part in _parts(path):
                    ray.get(self._host.append.remote(end, part))
            ray.get(self._host.settle.remote(staging, target))
            if not keep:
                shutil.rmtree(place)

    def commit(self, place: Path, state: Mapping[str, Any]) -> None:
        """Turn a folder at home into a checkpoint."""
        self._do("commit", self._home(place), dict(state))

    def prune(self, folder: Path, keep: int) -> None:
        """Delete all but the last checkpoints of a folder, at home; delete all of them on this node."""
        shutil.rmtree(folder, ignore_errors=True)
        self._do("prune", self._home(folder), keep)

    def remove(self, place: Path) -> None:
        """Delete a folder on this node and at home."""
        super().remove(place)
        self._do("remove", self._home(place))

    def write(self, path: Path, content: str) -> None:
        """Write a small file at home."""
        self._do("write", self._home(path), content)

    def _do(self, verb: str, path: Path, *arguments: Any) -> None:
        ray.get(self._host.do.remote(verb, str(path), *arguments))

    def _home(self, place: Path) -> Path:
        return Path("/") / place.relative_to(self._made)

    def _fetch(self, path: Path, copy: Path) -> bool:
        """Copy a file or folder of the home, unless there is a copy; return whether the home has it."""
        with locked(_lock(copy)):
            if copy.exists():
                return True
            files: dict[str, int] | None = ray.get(self._host.files.remote(str(path)))
            if files is None:
                return False
            staging = copy.with_name(f".{copy.name}-brought")
            shutil.rmtree(staging, ignore_errors=True)
            with room_on(copy.parent, sum(files.values())):
                staging.mkdir()
                for name, size in files.items():
                    self._fetch_file(path / name, staging / (name or "file"), size)
                (staging / "file" if "" in files else staging).rename(copy)
            return True

    def _fetch_file(self, path: Path, copy: Path, size: int) -> None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.open("wb") as file:
            for start in range(0, size, PART):
                file.write(ray.get(self._host.read.remote(str(path), start)))


def find_home(home: HomeNode, lane: str) -> Home:
    """Return this worker's access to the home.

    Args:
        home: how to find it.
        lane: identifies this start of the lane; the same on all its workers.
    """
    if home.node == ray.get_runtime_context().get_node_id() or Path(home.mark).is_file():
        return Home()
    return RemoteHome(ray.get(home.launcher.file_host.remote()), lane)


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield file.read(PART)
        while part := file.read(PART):
            yield part


def _lock(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.lock")


def _remove_stale(above: Path) -> None:
    """Delete the folders of lanes that were killed together with their node."""
    for path in above.glob("*") if above.is_dir() else ():
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

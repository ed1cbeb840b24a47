"""Files between the node on which a command runs, its home, and lanes on nodes with disks of their own.

The files at home are the ones that count. A lane elsewhere reads copies, which it fetches when it needs
them, and writes into a folder of its own. Checkpoints, adapters and results are sent home before they are
reported, so a trial whose node is lost continues on another one. All of it goes through Ray's object store
in parts of `PART` bytes.

    <cache>/lanes/<lane>/copies/<job>/…     what the lane reads
    <cache>/lanes/<lane>/made/<path>        what it writes, under the path that it has at home
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

from rayft.files import locked, room_on, sync_tree
from rayft.models.files import cache_folder
from rayft.sweep.settings import HomeNode
from rayft.train.home import Home

__all__ = ["FileHost", "RemoteHome", "find_home"]

PART = 2**25
"""Bytes that travel at once."""
STALE_SECONDS = 600.0
"""After how long without a sign of life the folder of a lane counts as left behind."""


class FileHost:
    """An actor on the home's node that reads and writes files for lanes elsewhere."""

    def files(self, path: str) -> dict[str, int] | None:
        """List the files at a path: name below it → bytes; None if nothing is there.

        Where the path is a file, its name is empty.
        """
        top = Path(path)
        if top.is_file():
            return {"": top.stat().st_size}
        if not top.is_dir():
            return None
        found = (one for one in top.rglob("*") if one.is_file())
        return {str(one.relative_to(top)): one.stat().st_size for one in found}

    def read(self, path: str, start: int) -> bytes:
        """Return a part of a file."""
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(PART)

    def begin(self, target: str) -> str:
        """Make a folder beside a target that is filled before it takes the target's place."""
        above = Path(target).parent
        with room_on(above):
            above.mkdir(parents=True, exist_ok=True)
            # Named as what `write_whole` fills, so the next command deletes what a killed lane left.
            staging = Path(tempfile.mkdtemp(prefix=f".{Path(target).name}-", dir=above)) / "new"
            staging.mkdir()
            return str(staging)

    def append(self, path: str, part: bytes) -> None:
        """Add a part to a file."""
        with room_on(Path(path).parent, len(part)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                file.write(part)

    def settle(self, staging: str, target: str) -> None:
        """Put what was filled in the target's place, beside what another node has sent for it."""
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
        """Do at home what `Home` does where its disk is seen: check, commit, prune, remove, write."""
        getattr(Home(), verb)(Path(path), *arguments)


class RemoteHome(Home):
    """The home of workers that do not see its disk.

    All workers of a lane on one node share a folder. What several of them ask for is brought once.

    Args:
        host: handle of the `FileHost`.
        lane: names this start of the lane; the same on all its workers.
    """

    seen = False

    def __init__(self, host: Any, lane: str) -> None:
        self._host = host
        above = cache_folder() / "lanes"
        _remove_stale(above)
        self._root = above / lane
        self._made = self._root / "made"
        self._made.mkdir(parents=True, exist_ok=True)
        self._scope = "lane"

    def alive(self) -> None:
        """Mark the folder as in use."""
        with suppress(OSError):
            os.utime(self._root)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._root, ignore_errors=True)

    @contextmanager
    def within(self, scope: str) -> Iterator[None]:
        """Let the copies that the block fetches belong to a scope, with which they are dropped."""
        before, self._scope = self._scope, scope
        try:
            yield
        finally:
            self._scope = before

    def drop(self, scope: str) -> None:
        """Delete the copies of a scope."""
        shutil.rmtree(self._root / "copies" / scope, ignore_errors=True)

    def local(self, path: str | Path) -> Path:
        """Return this node's copy of a file or folder; the path itself where this node has one of its own."""
        path = Path(path)
        if path.exists() or not path.is_absolute():
            return path
        name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        copy = self._root / "copies" / self._scope / name / path.name
        return copy if self._fetch(path, copy) else path

    def place(self, folder: Path) -> Path:
        """Return the folder of this node that stands for one of the home."""
        return self._made / folder.relative_to("/")

    def check(self, folder: Path) -> None:
        """Refuse a folder of the home that an adapter can't be written to."""
        self._do("check", folder)

    def bring(self, place: Path) -> None:
        """Fetch what the home has of a folder."""
        self._fetch(self._home(place), place)

    def send(self, place: Path, *, keep: bool = False) -> None:
        """Send a folder's files home, and delete them here unless they are kept."""
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
        """Turn a folder of the home into a checkpoint."""
        self._do("commit", self._home(place), dict(state))

    def prune(self, folder: Path, keep: int) -> None:
        """Delete all but the last checkpoints of a folder of the home."""
        shutil.rmtree(folder, ignore_errors=True)
        self._do("prune", self._home(folder), keep)

    def remove(self, place: Path) -> None:
        """Delete a folder, here and at home."""
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
        """Copy a file or folder of the home, unless that was done; return whether there is one."""
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
    """Return the home as this worker sees it.

    Args:
        home: how to find it.
        lane: names this start of the lane; the same on all its workers.
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
    """Delete what lanes left behind that were killed with their node."""
    for path in above.glob("*") if above.is_dir() else ():
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

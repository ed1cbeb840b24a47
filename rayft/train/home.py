"""`Home`: a worker's access to the files of the command that it works for.

The home is the node on which a command runs. It has the output folder, and often the base, the data and the
adapters that runs start from. Workers on the same node, or on a node that sees the same disk, use these files
directly. Other workers use copies (`rayft.sweep.transfer`). Both kinds of access have the methods of `Home`,
so training does not depend on where it runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rayft.artifacts import check_replaceable
from rayft.files import write_file
from rayft.train.checkpoint_folder import commit, prune

__all__ = ["Home"]


class Home:
    """Access for workers that see the home's disk: files are used where they are."""

    seen = True
    """Whether this worker sees the home's disk."""

    def local(self, path: str | Path) -> Path:
        """Return where this node has a file or folder of the home; fetch it if this node does not have it.

        A path that does not exist at home either is returned unchanged.
        """
        return Path(path)

    def place(self, folder: Path) -> Path:
        """Return the folder in which this node writes the files of a folder of the home."""
        return folder

    def check(self, folder: Path) -> None:
        """Refuse a folder to which no adapter can be written, as `rayft.artifacts.check_replaceable`."""
        check_replaceable(folder)

    def bring(self, place: Path) -> None:
        """Fetch the files that the home has for a folder that `place` returned."""

    def send(self, place: Path, *, keep: bool = False) -> None:
        """Copy what this node has written to the home.

        Args:
            place: a folder inside one that `place` returned.
            keep: whether the files also stay on this node.
        """

    def commit(self, place: Path, state: Mapping[str, Any]) -> None:
        """Turn a folder that all nodes have sent into a checkpoint, and delete all but the last two."""
        commit(place, state)

    def within(self, scope: str) -> AbstractContextManager[None]:
        """Assign the copies that the block fetches to a scope; `drop` deletes the copies of a scope."""
        return nullcontext()

    def drop(self, scope: str) -> None:
        """Delete the copies that were fetched within a scope."""

    def alive(self) -> None:
        """Mark this worker as alive, so that no other lane deletes its copies."""

    def close(self) -> None:
        """Delete all copies, and the files written on this node."""

    def prune(self, folder: Path, keep: int) -> None:
        """Delete all but the last `keep` checkpoints of a folder."""
        prune(folder, keep)

    def remove(self, place: Path) -> None:
        """Delete a folder on this node and at home."""
        shutil.rmtree(place, ignore_errors=True)

    def write(self, path: Path, content: str) -> None:
        """Write a small file atomically."""
        write_file(path, content)

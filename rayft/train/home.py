"""Where the files of a command are, as its workers see them.

The node on which a command runs, its home, has the output folder, and often the base, the data and the
adapters that it starts from. Workers on the same node, or on one that sees the same disk, use these files as
they are. Other workers use copies (`rayft.sweep.transfer`). Both are a `Home`, so training is the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rayft.artifacts import check_replaceable
from rayft.files import write_file

__all__ = ["Home"]


class Home:
    """The home of workers that see its disk: every path is what it says."""

    seen = True
    """Whether this worker sees the home's disk."""

    def local(self, path: str | Path) -> Path:
        """Return where this node has a file or folder of the home; a missing one is brought here.

        A path that does not exist at home either is returned as it is.
        """
        return Path(path)

    def place(self, folder: Path) -> Path:
        """Return where this node writes what belongs into a folder of the home."""
        return folder

    def check(self, folder: Path) -> None:
        """Refuse a folder that an adapter can't be written to, as `rayft.artifacts.check_replaceable`."""
        check_replaceable(folder)

    def bring(self, place: Path) -> None:
        """Fetch what the home holds for a folder that `place` returned."""

    def send(self, place: Path, *, keep: bool = False) -> None:
        """Copy what this node has written to the home.

        Args:
            place: a folder below one that `place` returned.
            keep: whether the files stay on this node as well.
        """

    def commit(self, place: Path, state: Mapping[str, Any]) -> None:
        """Turn a folder that all nodes have sent into a checkpoint, and drop those before the last two."""
        from rayft.train.checkpoint import commit

        commit(place, state)

    def within(self, scope: str) -> AbstractContextManager[None]:
        """Let the copies that the block fetches belong to a scope, with which they are dropped."""
        return nullcontext()

    def drop(self, scope: str) -> None:
        """Delete the copies of a scope."""

    def alive(self) -> None:
        """Show that this worker lives, so that nobody deletes its copies."""

    def close(self) -> None:
        """Delete all copies and what was written here."""

    def prune(self, folder: Path, keep: int) -> None:
        """Delete all but the last checkpoints of a folder."""
        from rayft.train.checkpoint import prune

        prune(folder, keep)

    def remove(self, place: Path) -> None:
        """Delete a folder, here and at home."""
        shutil.rmtree(place, ignore_errors=True)

    def write(self, path: Path, content: str) -> None:
        """Write a small file, whole or not at all."""
        write_file(path, content)

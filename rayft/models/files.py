"""Files of models: where they are kept, and hashes that are remembered while files stay what they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from rayft.errors import DiskFullError
from rayft.files import hash_content, write_file
from rayft.paths import home, read_path

__all__ = ["cache_folder", "hash_file", "hub_cache", "save_model"]

LARGE = 2**24
"""Bytes from which on a hash is remembered; smaller files are read again."""
SETTLED = 2.0
"""Seconds after which a change is old enough that a later one gets another time stamp on any file system."""


def cache_folder() -> Path:
    """Where converted models and hashes of files are kept: $RAYFT_CACHE, else ~/.cache/rayft."""
    given = os.environ.get("RAYFT_CACHE")
    return read_path(given, "RAYFT_CACHE") if given else home("RAYFT_CACHE") / ".cache" / "rayft"


def hub_cache() -> Path:
    """Return where the hub's downloads are kept."""
    import datasets

    return Path(datasets.config.constants.HF_HUB_CACHE)


def save_model(model: Any, folder: Path) -> None:
    """Write a model's folder, whatever this process is in a worker group.

    By itself, transformers writes nothing in a worker whose rank is not 0; but that worker may be the only
    one on its machine that needs the folder.
    """
    model.should_save_on_this_rank = lambda _main: True
    model.save_pretrained(folder)


def hash_file(path: Path) -> str:
    """Hash what is in a file (16 hex digits).

    The hash of a large file is remembered together with the file's inode, size and times. The time of the
    last change of the inode is among them, which no tool can set back, so that a copy that keeps the time of
    its source (`cp -p`, `rsync -t`) is read too.

    Raises:
        OSError: if the file can't be read.
    """
    found = path.stat()
    stamp = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    if found.st_size < LARGE:
        return hash_content(path)
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]
    note = cache_folder() / "hashes" / f"{name}.json"
    # A cache that can't be read or written costs time alone.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["hash"])
    value = hash_content(path)
    if time.time() - found.st_ctime > SETTLED:
        with contextlib.suppress(OSError, DiskFullError):
            write_file(note, json.dumps({"stamp": stamp, "hash": value, "path": str(path)}))
    return value

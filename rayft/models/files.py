"""Files of models: where they are kept, which of them are in use, and their hashes, which are cached."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayft.errors import DiskFullError
from rayft.files import hash_content, write_file
from rayft.paths import home, read_path

__all__ = ["cache_folder", "hash_file", "hub_cache", "quiet", "save_model", "unused", "use"]

LARGE = 2**24
"""Size in bytes from which a file's hash is cached; smaller files are read again."""
SETTLED = 2.0
"""Age in seconds of a change after which a later change gets another time stamp on every file system."""

_used: dict[Path, int] = {}
"""Models of the cache that this process uses → descriptors, which hold shared locks of their folders."""


def cache_folder() -> Path:
    """Return the folder of prepared data, converted models and hashes: $RAYFT_CACHE, or ~/.cache/rayft."""
    given = os.environ.get("RAYFT_CACHE")
    return read_path(given, "RAYFT_CACHE") if given else home("RAYFT_CACHE") / ".cache" / "rayft"


def hub_cache() -> Path:
    """Return the folder of the hub's downloads."""
    import datasets

    return Path(datasets.config.constants.HF_HUB_CACHE)


def use(folder: Path) -> None:
    """Mark a model of the cache as in use until this process ends, so that `rayft cache` does not delete it.

    The folder's time of modification becomes that of its last use. If the folder is missing, nothing happens.
    """
    # Without a lock, a model that is deleted while it is loaded has to be loaded again.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        finally:
            # Another folder may have had this path before.
            before = _used.pop(folder, None)
            _used[folder] = descriptor
            if before is not None:
                os.close(before)
    with contextlib.suppress(OSError):
        os.utime(folder)


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Yield whether no process uses a model of the cache. During the block, none begins to use it.

    Raises:
        OSError: if the folder is missing, or can't be locked.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings while a model is loaded or saved."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Write a model's folder, whatever rank this process has in a worker group.

    transformers alone writes nothing in a worker whose rank is not 0, but that worker may be the only one on
    its machine.

    Args:
        model: a model of transformers.
        folder: for its files.
        options: of `save_pretrained`.
    """
    model.should_save_on_this_rank = lambda _main: True
    with quiet():
        model.save_pretrained(folder, **options)


def hash_file(path: Path) -> str:
    """Hash the content of a file (16 hex digits).

    The hash of a large file is cached with the file's inode, size and times. One of them is the time of the
    inode's last change, which no tool can set back, so that a copy that keeps the time of its source
    (`cp -p`, `rsync -t`) is read again too.

    Raises:
        OSError: if the file can't be read.
    """
    found = path.stat()
    stamp = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    if found.st_size < LARGE:
        return hash_content(path)
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]
    note = cache_folder() / "hashes" / f"{name}.json"
    # Without a usable cache, hashing only takes longer.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["hash"])
    value = hash_content(path)
    if time.time() - found.st_ctime > SETTLED:
        with contextlib.suppress(OSError, DiskFullError):
            write_file(note, json.dumps({"stamp": stamp, "hash": value, "path": str(path)}))
    return value

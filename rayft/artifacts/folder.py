"""Adapter folders on disk: whole or not at all, and which modules PEFT is told were trained whole."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from rayft.errors import ResourceError

__all__ = ["saved_whole", "settle", "write_whole"]


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new folder (which is there, and empty) and put that in the place of `folder`.

    Whatever fails, `folder` is what it was.

    Raises:
        ResourceError: if the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new = staging / "new"
        new.mkdir(mode=0o755)
        write(new)
        _swap(new, folder, staging / "old")
    except (OSError, SafetensorError) as error:
        # safetensors writes in Rust and hands the system's error on as text.
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
            raise ResourceError(f"no space left for {folder}; free some and try again") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def settle(local: Path, target: Path) -> bool:
    """Move a folder to the place that its content names, and say whether that is there then.

    Another process may have put the same content there meanwhile: then that one stays.
    """
    local.chmod(0o755)
    with contextlib.suppress(OSError):
        local.rename(target)
    return target.is_dir()


def saved_whole(adapted: Iterable[str], heads: Iterable[str]) -> list[str]:
    """Name the modules that were trained whole: a head as one, since PEFT knows heads as one.

    Args:
        adapted: module paths that hold an adapter.
        heads: parameter paths of what was trained whole.
    """
    beside = {name.split(".")[0] for name in adapted}
    tops = {name: name.split(".")[0] for name in heads}
    return sorted({name.rsplit(".", 1)[0] if top in beside else top for name, top in tops.items()})


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Put `new` in the place of `folder`, which comes back if that fails."""
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    finally:
        if not folder.exists() and old.exists():
            old.rename(folder)

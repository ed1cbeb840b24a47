"""Adapter folders on disk: written whole or not at all, and never over something that rayft did not write."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rayft.artifacts.meta import CONFIG_FILE, META_FILE, WEIGHTS_FILE
from rayft.errors import ArtifactError, ResourceError
from rayft.files import room_on, sync_tree

__all__ = [
    "check_replaceable",
    "contains",
    "is_staged_folder",
    "replace_whole",
    "saved_whole",
    "settle",
    "write_weights",
    "write_whole",
]

FILES = {CONFIG_FILE, WEIGHTS_FILE, META_FILE}
"""The files of an adapter folder that rayft wrote."""


def check_replaceable(folder: Path, besides: Iterable[str] = ()) -> dict[str, Any] | None:
    """Refuse a place that holds anything but an adapter folder that rayft wrote.

    Args:
        folder: the place.
        besides: names of other files in it that rayft wrote too.

    Returns:
        The content of its `rayft.json`; None if nothing or an empty folder is there.

    Raises:
        ArtifactError: naming what is there and would be lost.
        ResourceError: if no folder can be made there.
    """
    above = next(path for path in folder.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        raise ResourceError(f"{folder} can't be made, because {above} is no folder; choose another")
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        what = "a link" if folder.is_symlink() else "a file"
        raise ArtifactError(
            f"{folder} is {what} that rayft did not make, so it is not replaced; choose another place"
        )
    found = {path.name for path in folder.iterdir()}
    if not found:
        return None
    strangers = sorted(found - FILES - {*besides})
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise ArtifactError(
            f"{folder} holds {', '.join(strangers[:3])}{more}, which rayft did not write with an adapter, "
            "so the folder is not replaced; move that away, or choose another place"
        )
    try:
        made = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        made = None
    if not isinstance(made, dict) or "format" not in made:
        raise ArtifactError(
            f"{folder} is no adapter folder of rayft's (it has no {META_FILE}), so it is not replaced; "
            "choose another place"
        )
    return made


def contains(outer: Path, inner: Path) -> bool:
    """Return whether `inner` is `outer` or is inside it, after links and spellings are resolved."""
    try:
        own = outer.stat()
    except OSError:
        return False
    for path in (inner.resolve(), *inner.resolve().parents):
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), own):
                return True
    return False


def write_whole(folder: Path, write: Callable[[Path], None], needed: int = 0) -> None:
    """Let `write` fill a new, empty folder, and replace `folder` by it.

    If anything fails, `folder` is what it was.

    Args:
        folder: the place.
        write: writes the files.
        needed: how many bytes it writes, for the message of a full disk.

    Raises:
        ArtifactError: if `folder` holds anything but an adapter folder of rayft's (`check_replaceable`).
        DiskFullError: if there is no space.
        ResourceError: if the folder can't be made.
    """
    check_replaceable(folder)
    replace_whole(folder, write, needed)


def replace_whole(folder: Path, write: Callable[[Path], None], needed: int = 0) -> None:
    """Do what `write_whole` does, and replace whatever folder is there: the caller has checked it.

    Raises:
        DiskFullError: if there is no space.
    """
    with room_on(folder.parent, needed):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            new = staging / "new"
            new.mkdir(mode=0o755)
            write(new)
            sync_tree(new)
            _swap(new, folder, staging / "old")
            sync_tree(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def is_staged_folder(path: Path) -> bool:
    """Return whether a path is a folder that `write_whole` was filling when its process was killed."""
    return (
        re.fullmatch(r"\..+-[a-z0-9_]{8}", path.name) is not None
        and path.is_dir()
        and {inner.name for inner in path.iterdir()} <= {"new", "old"}
    )


def settle(local: Path, target: Path) -> bool:
    """Move a folder to the place that its content names, and return whether a folder is there afterwards.

    What is there is deleted: the caller has found that it is not that content any more. If another process
    then puts the same content there first, that folder stays.
    """
    shutil.rmtree(target, ignore_errors=True)
    local.chmod(0o755)
    with contextlib.suppress(OSError):
        local.rename(target)
    return target.is_dir()


def saved_whole(adapted: Iterable[str], heads: Iterable[str]) -> list[str]:
    """Return the names of the modules that were trained whole; a head is one module, as in PEFT.

    Args:
        adapted: module paths that hold an adapter.
        heads: paths of the parameters that were trained whole.
    """
    beside = {name.split(".")[0] for name in adapted}
    tops = {name: name.split(".")[0] for name in heads}
    return sorted({name.rsplit(".", 1)[0] if top in beside else top for name, top in tops.items()})


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Replace `folder` by `new`; if that fails, `folder` is put back."""
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    finally:
        if not folder.exists() and old.exists():
            old.rename(folder)


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter folder's tensors; ones that share memory are written as often as they have names."""
    written: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        made = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors of one memory.
        written[name] = made.clone() if made.untyped_storage().data_ptr() in seen else made
        seen.add(made.untyped_storage().data_ptr())
    save_file(written, folder / WEIGHTS_FILE, metadata={"format": "pt"})

"""The folder in which a run keeps its checkpoints, as it is on disk.

checkpoint/step-000020/…           masters.safetensors, or DeepSpeed's files from all workers, without frozen
                                   parameters (`rayft.train.checkpoint`)
checkpoint/step-000020/best/       what the best evaluation before it left, if it was an earlier one
checkpoint/step-000020/state.json  step, identity, curves and the hashes of those files

`state.json` is written last: a folder without it is no checkpoint. A run keeps its last two checkpoints. A
checkpoint is used only if its files have the recorded hashes. rayft 0.1.0 kept one checkpoint, with its state
in checkpoint/state.json and without hashes.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayft.config import in_one_line
from rayft.files import hash_content, sync_tree, write_file
from rayft.identity import Identity

__all__ = [
    "MASTERS_FILE",
    "STATE_FILE",
    "Checkpoint",
    "checkpoint_identity",
    "checkpoints",
    "commit",
    "is_portable",
    "last_curve",
    "last_step",
    "prune",
]

STATE_FILE = "state.json"
MASTERS_FILE = "masters.safetensors"
"""File of a checkpoint from which any engine can continue."""
KEPT = 2
"""Number of checkpoints that a run keeps while it trains."""
THREADS = 8
"""Number of files that are hashed at the same time."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it is on disk."""

    place: Path
    step: int
    state: Mapping[str, Any] = field(default_factory=dict)
    identity: Identity | None = None
    """What the checkpoint follows from; None if its state can't be read."""
    problem: str = ""
    """Why the state can't be read."""
    old: bool = False
    """Whether rayft 0.1.0 wrote the checkpoint."""

    def damage(self) -> str:
        """Return what is wrong with the checkpoint's files; empty if they are intact."""
        if self.problem:
            return self.problem
        if self.old and "files" not in self.state:
            return _unpacks(self.place)
        recorded = self.state["files"]
        lost = [name for name in recorded if not (self.place / name).is_file()]
        if lost:
            return f"{lost[0]} is missing"
        found = _hashes(self.place)
        changed = [name for name, value in recorded.items() if found[name] != value]
        return f"{changed[0]} is not what was written" if changed else ""


def is_portable(place: Path) -> bool:
    """Return whether any engine can continue from a checkpoint, which DeepSpeed's files do not allow.

    Args:
        place: the checkpoint's folder.
    """
    return (place / MASTERS_FILE).is_file()


def checkpoints(folder: Path) -> list[Checkpoint]:
    """List the checkpoints of a folder, the last one first."""
    found = [_read(place, place / STATE_FILE) for place in folder.glob("step-*")]
    old = folder / STATE_FILE
    if old.is_file():
        one = _read(folder, old, old=True)
        # `found` has its folder too, as one without a state file.
        found = [one, *(other for other in found if other.place != one.place)]
    return sorted(found, key=lambda one: one.step, reverse=True)


def commit(place: Path, state: Mapping[str, Any]) -> None:
    """Turn a folder with all workers' files into a checkpoint, then delete all but the last two.

    Args:
        place: the checkpoint's folder.
        state: written beside the files; must hold `step`, `tag` and `identity`.
    """
    sync_tree(place)
    write_file(place / STATE_FILE, json.dumps({**state, "files": _hashes(place)}))
    prune(place.parent, KEPT)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the last checkpoints of a folder, and folders that never became a checkpoint.

    Args:
        folder: the run's checkpoint folder.
        keep: the number of checkpoints to keep.
    """
    kept = [one.place for one in checkpoints(folder) if one.identity is not None][:keep]
    old = folder / STATE_FILE
    if old.is_file() and not any(one.old and one.place in kept for one in checkpoints(folder)):
        old.unlink()
    for place in folder.glob("step-*"):
        if place not in kept:
            shutil.rmtree(place, ignore_errors=True)


def last_curve(folder: Path) -> list[tuple[int, float]]:
    """Return the validation losses before the step of the last checkpoint whose state can be read.

    This does not check the checkpoint's files: `last_state` may find that an earlier checkpoint must be used.
    """
    last = _last(folder)
    if last is None:
        return []
    return [(int(step), float(loss)) for step, loss in last.state["val_curve"] if step < last.step]


def checkpoint_identity(folder: Path) -> Identity | None:
    """Return the identity recorded in the last checkpoint of a folder; None if no state can be read."""
    last = _last(folder)
    return None if last is None else last.identity


def last_step(folder: Path) -> int:
    """Return the step of the last checkpoint whose state can be read; 0 if there is none."""
    last = _last(folder)
    return 0 if last is None else last.step


def _last(folder: Path) -> Checkpoint | None:
    """Return the last checkpoint whose state can be read."""
    return next((one for one in checkpoints(folder) if one.identity is not None), None)


def _read(place: Path, path: Path, *, old: bool = False) -> Checkpoint:
    """Read the state of a checkpoint."""
    digits = place.name.removeprefix("step-")
    step = int(digits) if digits.isdecimal() else 0
    if not path.is_file():
        return Checkpoint(place, step, problem=f"it has no {path.name}: it was not written to its end")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        step, identity = int(state["step"]), _identity(state)
        if old:
            place = path.parent / str(state.get("tag", ""))
        else:
            dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = in_one_line(error)
        return Checkpoint(place, step, problem=f"{path.name} is damaged: {reason}", old=old)
    return Checkpoint(place, step, state, identity, old=old)


def _identity(state: Mapping[str, Any]) -> Identity:
    if "identity" in state:
        return Identity.model_validate(state["identity"])
    # rayft 0.1.0 recorded the adapter that it started from; the run's hash is in the folder's name.
    return Identity(start=state.get("start", ""))


def _hashes(place: Path) -> dict[str, str]:
    """Hash the files of a checkpoint: path in its folder → hash."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and path != place / STATE_FILE)
    names = (str(path.relative_to(place)) for path in files)
    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(names, threads.map(hash_content, files), strict=True))


def _unpacks(place: Path) -> str:
    """Check the CRC sums inside the files of a checkpoint without recorded hashes; return what is wrong."""
    files = sorted(place.glob("*.pt"))
    if not any(path.name.endswith("model_states.pt") for path in files):
        return "it has no files"
    for path in files:
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return f"{path.name} is damaged"
        except (OSError, zipfile.BadZipFile):
            return f"{path.name} is damaged"
    return ""

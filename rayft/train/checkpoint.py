"""Checkpoints of a run: trainable parameters, optimizer state and the step, whole or not at all.

checkpoint/step-00020/…        DeepSpeed's files, from all workers, frozen parameters left out
checkpoint/state.json          step, file folder, identity, curves; written last, so it commits
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rayft.errors import TrainError
from rayft.files import write_file
from rayft.identity import Identity
from rayft.train.context import Worker
from rayft.train.deepspeed import Engine

__all__ = ["checkpoint_identity", "last_state", "restore", "save"]

STATE_FILE = "state.json"


def save(folder: Path, engine: Engine, identity: Identity, worker: Worker, state: Mapping[str, Any]) -> None:
    """Write a checkpoint (all workers call it) and drop the one before.

    Args:
        folder: the run's checkpoint folder.
        engine: the engine to save.
        identity: what the run follows from.
        worker: this process.
        state: JSON-able; must hold `step`.
    """
    tag = f"step-{state['step']:06d}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
    if worker.world > 1:
        dist.barrier()
    if worker.rank == 0:
        kept = identity.brief.model_dump(mode="json", exclude_defaults=True)
        write_file(folder / STATE_FILE, json.dumps({**state, "tag": tag, "identity": kept}))
        for old in folder.glob("step-*"):
            if old.name != tag:
                shutil.rmtree(old, ignore_errors=True)


def last_state(folder: Path, now: Identity) -> dict[str, Any] | None:
    """Read the state of the last whole checkpoint, or None if there is none.

    Args:
        folder: the run's checkpoint folder.
        now: what the run follows from.

    Raises:
        TrainError: if the checkpoint follows from something else, naming what.
    """
    state = _read(folder)
    if state is None:
        return None
    changed = _identity(state).differences(now)
    if changed:
        raise TrainError(
            f"{folder} holds a checkpoint of another run: {'; '.join(changed)}. Put back what it was, give "
            "this run another output folder, or delete the checkpoint to start again"
        )
    return state


def checkpoint_identity(folder: Path) -> Identity | None:
    """Return what the checkpoint in a folder follows from; None if there is no checkpoint."""
    state = _read(folder)
    return None if state is None else _identity(state)


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise TrainError(f"{path} is damaged ({error}); delete {folder} to start again") from error


def _identity(state: Mapping[str, Any]) -> Identity:
    if "identity" in state:
        return Identity.model_validate(state["identity"])
    # rayft 0.1.0 recorded the adapter that it started from; the run's hash is in the folder's name.
    return Identity(start=state.get("start", ""))


def restore(folder: Path, engine: Engine, state: Mapping[str, Any]) -> None:
    """Load parameters and optimizer state of a checkpoint into an engine (all workers call it).

    Raises:
        TrainError: if its files are gone or damaged.
    """
    try:
        path, _ = engine.load_checkpoint(str(folder), tag=state["tag"], load_module_strict=False)
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise TrainError(
            f"the checkpoint {folder}/{state['tag']} is damaged ({error}); delete {folder}"
        ) from error
    if path is None:
        raise TrainError(
            f"the checkpoint {folder}/{state['tag']} has no files; delete {folder} to start again"
        )

"""Checkpoints of a run: trainable parameters, optimizer state and the step, whole or not at all.

checkpoint/step-00020/…        DeepSpeed's files, from all workers, frozen parameters left out
checkpoint/state.json          step, file folder, run hash, curves; written last, so it commits
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rayft.config import content_hash
from rayft.errors import TrainError
from rayft.train.context import Worker
from rayft.train.deepspeed import Engine
from rayft.train.run import RunConfig

__all__ = ["last_state", "restore", "save"]

STATE_FILE = "state.json"


def save(folder: Path, engine: Engine, run: RunConfig, worker: Worker, state: Mapping[str, Any]) -> None:
    """Write a checkpoint (all workers call it) and drop the one before.

    Args:
        folder: the run's checkpoint folder.
        engine: the engine to save.
        run: the run, whose hash is kept.
        worker: this process.
        state: JSON-able; must hold `step`, and `start` where the run started from an adapter.
    """
    tag = f"step-{state['step']:06d}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
    if worker.world > 1:
        dist.barrier()
    if worker.rank == 0:
        path = folder / STATE_FILE
        staging = path.with_suffix(".tmp")
        staging.write_text(json.dumps({**state, "tag": tag, "run": content_hash(run)}))
        os.replace(staging, path)
        for old in folder.glob("step-*"):
            if old.name != tag:
                shutil.rmtree(old, ignore_errors=True)


def last_state(folder: Path, run: RunConfig, start: str = "") -> dict[str, Any] | None:
    """Read the state of the last whole checkpoint, or None if there is none.

    Args:
        folder: the run's checkpoint folder.
        run: the run.
        start: content hash of the adapter that it starts from.

    Raises:
        TrainError: if the checkpoint is of another run, or `run.start` has become another adapter.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    state = json.loads(path.read_text())
    if state["run"] != content_hash(run):
        raise TrainError(
            f"{folder} holds a checkpoint of another configuration; give this run another output folder, "
            "or delete that one"
        )
    if state.get("start", "") != start:
        raise TrainError(
            f"{folder} holds a checkpoint of a run that started from another adapter: what is in {run.start} "
            "has changed since. Put that back, or delete the checkpoint to start again"
        )
    return dict(state)


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

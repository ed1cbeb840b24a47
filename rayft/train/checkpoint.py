"""Save a run's trainable parameters, optimizer state and progress as a checkpoint, and load them again.

Rank 0 writes what trains in an adapter, with its optimizer state, to one file, from which any number of
workers, any stage of ZeRO below 3 and a packed run can continue. Where that would be a whole model, or
ZeRO-3 or settings of DeepSpeed's own add a state that is not a parameter's, each worker writes DeepSpeed's
files.

If the files of the last checkpoint are damaged, the run continues from the checkpoint before it, or from the
start. `checkpoint_folder` describes the files.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rayft.errors import DiskFullError, TrainError
from rayft.files import room_on
from rayft.identity import Identity
from rayft.train.best import BEST, Kept
from rayft.train.checkpoint_folder import (
    MASTERS_FILE,
    STATE_FILE,
    Checkpoint,
    checkpoints,
    is_portable,
)
from rayft.train.deepspeed import DeepSpeedEngine, check_written, checkpoint_bytes, trained_state
from rayft.train.masters import Holder, load_masters, read_masters, save_masters, write_masters
from rayft.train.session import Session
from rayft.train.worker import Worker

__all__ = ["last_state", "restore", "save"]


def save(
    folder: Path,
    engine: DeepSpeedEngine | Holder,
    state: Mapping[str, Any],
    identity: Identity,
    session: Session,
    best: Kept | None = None,
    *,
    portable: bool = True,
) -> None:
    """Write a checkpoint (all workers call it), then delete all but the last two.

    Args:
        folder: where this node writes the run's checkpoints.
        engine: the engine to save.
        state: the state of the run, which must be JSON-able and hold `step`.
        identity: what the run follows from.
        session: says which worker this is, and has the home that keeps the checkpoint.
        best: on rank 0, what the best evaluation left, unless that is what the engine has.
        portable: whether rank 0 writes all, instead of DeepSpeed (only below ZeRO-3).

    Raises:
        DiskFullError: on all workers, if one of them has no space; the previous checkpoint stays.
    """
    worker, home, tag = session.worker, session.home, f"step-{state['step']:06d}"
    place = folder / tag
    with worker.together():
        if worker.rank == 0:
            # An earlier attempt at this step may have left files.
            home.remove(place)
    try:
        with worker.together():
            if portable:
                _write_masters(place, engine, session)
            else:
                _write(folder, tag, engine)
            if best is not None:
                with room_on(folder):
                    best.save(place / BEST)
        with worker.together():
            home.send(place)
        with worker.together(), room_on(folder):
            if worker.rank == 0:
                kept = identity.brief.model_dump(mode="json", exclude_defaults=True)
                home.commit(place, {**state, "tag": tag, "identity": kept})
    except DiskFullError:
        # Without a state file it can't be used as a checkpoint, and would take space that others need.
        home.remove(place)
        raise


def _write_masters(place: Path, engine: DeepSpeedEngine | Holder, session: Session) -> None:
    masters = read_masters(engine)
    if session.worker.rank > 0:
        return
    others = {name: value for name, value in trained_state(engine.module).items() if name not in masters}
    with room_on(place.parent, checkpoint_bytes(engine.module)):
        place.mkdir(parents=True, exist_ok=True)
        save_masters(masters, others, place / MASTERS_FILE)


def _write(folder: Path, tag: str, engine: DeepSpeedEngine) -> None:
    with room_on(folder, checkpoint_bytes(engine.module)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        check_written(engine)


def last_state(
    folder: Path, now: Identity, worker: Worker, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any] | None:
    """Return the state of the last checkpoint whose files are intact; None if there is none.

    All workers call it. Rank 0 chooses for all of them, and deletes the damaged checkpoints after the chosen
    one.

    Args:
        folder: the run's checkpoint folder.
        now: what the run follows from.
        worker: this process.
        note: called on rank 0 with a sentence for each checkpoint that can't be used.

    Raises:
        TrainError: if the checkpoint follows from something else; the message names it.
    """
    choice: _Choice = worker.agreed(_choose(folder, now) if worker.rank == 0 else None)
    if choice.refusal:
        raise TrainError(choice.refusal)
    if worker.rank == 0:
        for place in choice.damaged:
            shutil.rmtree(place, ignore_errors=True)
        if choice.damaged and (choice.state is None or "files" in choice.state):
            (folder / STATE_FILE).unlink(missing_ok=True)
        for text in choice.notes:
            note(text)
    return choice.state


def restore(folder: Path, engine: DeepSpeedEngine | Holder, state: Mapping[str, Any]) -> None:
    """Load the parameters and the optimizer state of a checkpoint into an engine (all workers call it).

    Raises:
        TrainError: if the checkpoint's files are missing or damaged, or a packed run can't continue from it.
    """
    place = folder / state["tag"]
    if is_portable(place):
        try:
            masters, others = load_masters(place / MASTERS_FILE)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise TrainError(f"the checkpoint {place} is damaged ({error}); delete {folder}") from error
        engine.module.load_state_dict(others, strict=False)
        parameters = dict(engine.module.named_parameters())
        for name, master in masters.items():
            parameters[name].data.copy_(master.weight)
        write_masters(engine, masters)
        return
    if isinstance(engine, Holder):
        raise TrainError(
            f"the checkpoint {folder}/{state['tag']} was written by an earlier version, from which packed "
            "trials can't continue: set sweep.slots: 1"
        )
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


@dataclass(frozen=True)
class _Choice:
    """What rank 0 decided for all workers."""

    state: dict[str, Any] | None = None
    refusal: str = ""
    notes: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()


def _choose(folder: Path, now: Identity) -> _Choice:
    """Find the last checkpoint whose files are intact."""
    damaged: dict[Path, str] = {}
    chosen: Checkpoint | None = None
    for one in checkpoints(folder):
        if one.identity is not None and (changed := one.identity.differences(now)):
            return _Choice(
                refusal=f"{folder} holds a checkpoint of another run: {'; '.join(changed)}. Put back what it "
                "was, give this run another output folder, or delete the checkpoint to start again"
            )
        problem = one.damage()
        if not problem:
            chosen = one
            break
        damaged[one.place] = problem
    instead = f"the run continues from step {chosen.step}" if chosen else "the run starts again"
    notes = [f"the checkpoint {place} can't be used ({why}): {instead}" for place, why in damaged.items()]
    return _Choice(dict(chosen.state) if chosen else None, "", tuple(notes), tuple(damaged))

"""What a trial leaves: result.json, and whether that and the adapter beside it can still be used.

trials/<key>/result.json   `TrainResult`, tracked run, what it follows from; written last, so it commits
trials/<key>/adapter       the adapter (`model` of a full fine-tune)

A result counts only if it can be read and what lies beside it is what it names. Otherwise the trial has not
ended, and is trained again from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rayft.artifacts.folder import FILES
from rayft.artifacts.meta import META_FILE, ArtifactMeta
from rayft.errors import ArtifactError
from rayft.identity import Identity
from rayft.models.files import hash_file
from rayft.peft.folder import load_adapter
from rayft.train.checkpoint import checkpoint_identity
from rayft.train.context import trial_folder
from rayft.train.home import Home

__all__ = [
    "RESULT_FILE",
    "damage",
    "discard",
    "file_hashes",
    "left_identity",
    "read_result",
    "result_identity",
    "write_result",
]

RESULT_FILE = "result.json"


class _Needed(BaseModel):
    """What has to be in a result, whichever version wrote it."""

    finished: bool
    steps: int
    val_loss: float
    val_curve: list[tuple[int, float]]
    folder: str = ""
    content_hash: str = ""


def read_result(output: str | Path, key: str) -> dict[str, Any] | None:
    """Read what a trial that has ended left; None if there is nothing that can be read."""
    return _read(trial_folder(output, key))[0]


def write_result(folder: Path, values: Mapping[str, Any], home: Home | None = None) -> None:
    """Write the result of a trial that has ended, whole or not at all.

    Args:
        folder: the trial's, as this node sees it.
        values: what is kept.
        home: where the trial's folder is; on this node's disk where not given.
    """
    (home or Home()).write(folder / RESULT_FILE, json.dumps(values, indent=2))


def damage(folder: Path) -> str:
    """Return why the result in a trial's folder can't be used; empty if it can, or if there is none."""
    values, problem = _read(folder)
    return problem if values is None else _artifact_damage(values)


def discard(folder: Path) -> None:
    """Delete a trial's result and its adapter, which the next training replaces; its checkpoints stay.

    A folder that holds other files than an adapter of rayft's stays: the training refuses it by name.
    """
    (folder / RESULT_FILE).unlink(missing_ok=True)
    adapter = folder / "adapter"
    if adapter.is_dir() and not adapter.is_symlink() and {path.name for path in adapter.iterdir()} <= FILES:
        shutil.rmtree(adapter)


def file_hashes(folder: Path) -> dict[str, str]:
    """Hash the files of a tuned model, which has no content hash of its own: name → hash."""
    return {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.is_file()}


def result_identity(folder: Path, values: Mapping[str, Any]) -> Identity:
    """Return what a trial's result follows from, as far as it was recorded.

    Args:
        folder: the trial's.
        values: its result, as `read_result` returns it.
    """
    if "identity" in values:
        return Identity.model_validate(values["identity"])
    # Of rayft 0.1.0: what the adapter says of itself; the run's hash is in the folder's name.
    try:
        meta = ArtifactMeta.model_validate_json((folder / "adapter" / META_FILE).read_bytes())
    except (OSError, ValueError):
        # A tuned model has none; a damaged one is found by `damage`.
        meta = ArtifactMeta()
    return Identity(
        data=meta.data_digest,
        fingerprint=meta.base_fingerprint,
        start=meta.parent,
    )


def left_identity(folder: Path) -> Identity | None:
    """Return what a trial's result follows from, or else its checkpoint; None if neither can be read."""
    values, _ = _read(folder)
    if values is not None:
        return result_identity(folder, values)
    return checkpoint_identity(folder / "checkpoint")


def _read(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Read a trial's result; None, and why, if it can't be read."""
    path = folder / RESULT_FILE
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
        result = values["result"]
        needed = _Needed.model_validate(result)
        str(values["run_id"])
        Identity.model_validate(values.get("identity", {}))
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"{path} is damaged ({reason})"
    if needed.folder:
        # Where the sweep's folder is now, which may have been moved.
        result["folder"] = str(folder / Path(needed.folder).name)
    return values, ""


def _artifact_damage(values: Mapping[str, Any]) -> str:
    """Return what is wrong with the adapter or model that a result names."""
    result = values["result"]
    place = Path(result.get("folder", ""))
    if not result.get("content_hash"):
        return _model_damage(place, values.get("hashes"))
    try:
        found = load_adapter(place).content_hash
    except ArtifactError as error:
        return str(error)
    if not (place / META_FILE).is_file():
        return f"{place} has no {META_FILE}"
    if found != result["content_hash"]:
        return f"{place} holds another adapter ({found}) than {RESULT_FILE} names ({result['content_hash']})"
    return ""


def _model_damage(place: Path, recorded: Mapping[str, str] | None) -> str:
    """Return what is wrong with a tuned model; rayft 0.1.0 recorded no hashes of its files."""
    if not place.is_dir():
        return f"{place} is missing"
    found = file_hashes(place)
    for name, value in (recorded or {}).items():
        if found.get(name) != value:
            return (
                f"{place / name} is not what was written" if name in found else f"{place / name} is missing"
            )
    return ""

"""The result of a trial on disk, and whether it and the adapter beside it can still be used.

trials/<key>/result.json   `TrialResult`
trials/<key>/adapter       the adapter (`model` if the whole model was trained)

result.json is written last. A result is used only if it can be read and the adapter beside it is the one that
it names. Otherwise the trial counts as not ended, and is trained again from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rayft.artifacts.folder import FILES
from rayft.artifacts.meta import META_FILE, ArtifactMeta
from rayft.config import in_one_line
from rayft.errors import ArtifactError
from rayft.identity import Identity
from rayft.models.files import hash_file
from rayft.peft.folder import load_adapter
from rayft.train.checkpoint_folder import checkpoint_identity
from rayft.train.course import TrainResult
from rayft.train.home import Home

__all__ = [
    "RESULT_FILE",
    "TrialResult",
    "damage",
    "discard",
    "file_hashes",
    "left_identity",
    "read_result",
    "trial_folder",
    "write_result",
]

RESULT_FILE = "result.json"
TRAIN_RESULT = TypeAdapter(TrainResult)


def trial_folder(output: str | Path, key: str) -> Path:
    """Return the folder in which a trial keeps its checkpoints, its adapter and its result."""
    return Path(output) / "trials" / key


@dataclass(frozen=True)
class TrialResult:
    """What a trial left that has ended, as result.json keeps it."""

    result: TrainResult
    run_id: str
    """The trial's run in the tracker; empty if it is not tracked."""
    identity: Identity
    """What the result follows from."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Hashes of a tuned model's files, which has no content hash: name → hash. rayft 0.1.0 recorded none."""

    def with_seconds(self, **seconds: float) -> TrialResult:
        """Return the result with other times in `TrainResult.seconds`."""
        return replace(self, result=replace(self.result, seconds=self.result.seconds | seconds))

    def to_json(self) -> str:
        """Return the text of result.json."""
        values: dict[str, Any] = {"result": asdict(self.result), "run_id": self.run_id}
        values["identity"] = self.identity.model_dump(mode="json", exclude_defaults=True)
        if self.hashes:
            values["hashes"] = dict(self.hashes)
        return json.dumps(values, indent=2)


def read_result(output: str | Path, key: str) -> TrialResult | None:
    """Read the result of a trial that has ended; return None if there is none that can be read."""
    return _read(trial_folder(output, key))[0]


def write_result(folder: Path, result: TrialResult, home: Home | None = None) -> None:
    """Write the result of a trial atomically.

    Args:
        folder: the trial's folder, as this node sees it.
        result: the result.
        home: where the trial's folder is; by default on this node's disk.
    """
    (home or Home()).write(folder / RESULT_FILE, result.to_json())


def damage(folder: Path) -> str:
    """Return why the result in a trial's folder can't be used; empty if it can, or if there is none."""
    result, problem = _read(folder)
    return problem if result is None else _artifact_damage(result)


def discard(folder: Path) -> None:
    """Delete a trial's result and its adapter, which the next training replaces; the checkpoints stay.

    A folder that holds anything but an adapter written by rayft stays: the training refuses to replace it.
    """
    (folder / RESULT_FILE).unlink(missing_ok=True)
    adapter = folder / "adapter"
    if adapter.is_dir() and not adapter.is_symlink() and {path.name for path in adapter.iterdir()} <= FILES:
        shutil.rmtree(adapter)


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of a tuned model's files, which has no content hash: name → hash."""
    return {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.is_file()}


def left_identity(folder: Path) -> Identity | None:
    """Return what a trial's result follows from, or else its checkpoint; None if neither can be read."""
    result, _ = _read(folder)
    return checkpoint_identity(folder / "checkpoint") if result is None else result.identity


def _read(folder: Path) -> tuple[TrialResult | None, str]:
    """Read a trial's result; return None and the reason if it can't be read."""
    path = folder / RESULT_FILE
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
        result = TRAIN_RESULT.validate_python(values["result"])
        identity = (
            Identity.model_validate(values["identity"]) if "identity" in values else _old_identity(folder)
        )
        if result.folder:
            # The sweep's folder may have been moved since.
            result = replace(result, folder=str(folder / Path(result.folder).name))
        return TrialResult(result, str(values["run_id"]), identity, dict(values.get("hashes") or {})), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = in_one_line(error)
        return None, f"{path} is damaged ({reason})"


def _old_identity(folder: Path) -> Identity:
    """Return what a result of rayft 0.1.0 follows from, as far as the adapter beside it records it.

    The hash of the run is in the folder's name.
    """
    try:
        meta = ArtifactMeta.model_validate_json((folder / "adapter" / META_FILE).read_bytes())
    except (OSError, ValueError):
        # A tuned model has none; `damage` finds a damaged one.
        meta = ArtifactMeta()
    return Identity(data=meta.data_digest, fingerprint=meta.base_fingerprint, start=meta.parent)


def _artifact_damage(left: TrialResult) -> str:
    """Return what is wrong with the adapter or model that a result names; empty if nothing is."""
    expected, place = left.result.content_hash, Path(left.result.folder)
    if not expected:
        return _model_damage(place, left.hashes)
    try:
        found = load_adapter(place).content_hash
    except ArtifactError as error:
        return str(error)
    if not (place / META_FILE).is_file():
        return f"{place} has no {META_FILE}"
    if found != expected:
        return f"{place} holds another adapter ({found}) than {RESULT_FILE} names ({expected})"
    return ""


def _model_damage(place: Path, recorded: Mapping[str, str]) -> str:
    """Return what is wrong with a tuned model; empty if nothing is, or if no hashes were recorded."""
    if not place.is_dir():
        return f"{place} is missing"
    found = file_hashes(place)
    for name, value in recorded.items():
        if found.get(name) != value:
            return (
                f"{place / name} is not what was written" if name in found else f"{place / name} is missing"
            )
    return ""

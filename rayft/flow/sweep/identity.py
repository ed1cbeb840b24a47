"""The data and the base of a sweep's results, compared with the present ones before a result is used again.

`identity.json` in the sweep's folder records them. rayft 0.1.0 did not write that file; there the records of
the sweep and of its adapters are compared. (`rayft.flow.sweep.folder` compares the configuration.)
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from rayft.config import leaves
from rayft.data.prepared import prepare
from rayft.data.source import Parts
from rayft.errors import ConfigError, ReportError
from rayft.flow.config import IDENTITY_FILE
from rayft.identity import Identity
from rayft.models.files import cache_folder
from rayft.models.fingerprint import source_fingerprint
from rayft.models.load import ModelConfig, load_encoder, load_skeleton, resolve
from rayft.report.record import SweepRecord
from rayft.sweep.result import left_identity
from rayft.sweep.space import Point
from rayft.train.identity import identify
from rayft.train.run import RunConfig

__all__ = [
    "begins",
    "begun_by",
    "check_identity",
    "current_identity",
    "not_used",
    "recorded_sweep",
    "sweep_id",
    "write_identity",
]

OTHER_FOLDER = "choose another folder with --set output=…, or delete that one"


def check_identity(
    output: Path, now: Identity, model: ModelConfig, otherwise: str = OTHER_FOLDER
) -> Identity:
    """Check that the results in a sweep's folder come from the present data and base.

    A folder without results of trials passes for any data and base.

    Args:
        output: the sweep's folder, or one that is still to be made.
        now: data and base as they are now.
        model: the base.
        otherwise: what the message offers a user whose former data and base are gone.

    Returns:
        `now`, with a fingerprint of the base where results of rayft 0.1.0 have one to compare.

    Raises:
        ConfigError: naming what has changed, or what was not recorded. Nothing is changed then.
    """
    left = _left(output)
    if not left:
        return now
    before = _read(output)
    known = [*([before] if before else _recorded(output)), *left.values()]
    fingerprints = [one.fingerprint for one in known if one.fingerprint and not one.base]
    if fingerprints:
        own = source_fingerprint(load_skeleton(model), resolve(model), model.revision)
        # Where the files give no fingerprint, the lanes compare after they have loaded the base.
        now = now.model_copy(update={"fingerprint": own or fingerprints[0]})
    changed = next((found for one in known if (found := one.differences(now))), [])
    if changed:
        raise ConfigError(
            f"{output} holds results that can't be used with what is there now: {'; '.join(changed)}. "
            f"Nothing was changed. Restore what it was, {otherwise}"
        )
    recorded = {
        "data": any(one.data for one in known),
        "base": any(one.base or one.fingerprint for one in known),
    }
    if not all(recorded.values()):
        lacking = " and ".join(what for what, is_known in recorded.items() if not is_known)
        raise ConfigError(
            f"{', '.join(map(str, left))}: rayft 0.1.0 did not record which {lacking} this was trained with, "
            f"so it can't be used again. Nothing was changed. Delete it to train it again, {otherwise}"
        )
    return now


def current_identity(run: RunConfig, sweep: Path | None = None, parts: Parts | None = None) -> Identity:
    """Read the data of a run, and return the identity of its data and base as they are now.

    Args:
        run: the run, which names both.
        sweep: the folder of the sweep that the run's configuration comes from, if any. Its results must come
            from the same data and base.
        parts: the data, if it was read already.

    Raises:
        ConfigError: if the sweep's results come from other data or another base.
        DataError, ModelError: if one of them can't be read.
    """
    if parts is None:
        parts = prepare(run.data, load_encoder(run.model), cache_folder()).parts
    now = identify(run, parts)
    if sweep is not None:
        now = check_identity(sweep, now, run.model, "or name other data or another base with --config")
    if not now.fingerprint:
        known = source_fingerprint(load_skeleton(run.model), resolve(run.model), run.model.revision)
        now = now.model_copy(update={"fingerprint": known or ""})
    return now


def sweep_id(output: Path, now: Identity) -> str:
    """Return the id of the sweep in a folder, or a new id if a new sweep starts there.

    The id is empty for a sweep that a version of rayft without such ids has started.
    """
    before = _read(output)
    if before is not None and (before.sweep or _left(output)) and not before.differences(now):
        return before.sweep
    return "" if _left(output) else uuid.uuid4().hex[:12]


def recorded_sweep(sweep: Path | None) -> str:
    """Return the recorded id of the sweep in a folder; empty without a sweep, or for one of rayft 0.1.0."""
    found = _read(sweep) if sweep is not None else None
    return found.sweep if found else ""


def begins(output: Path, now: Identity) -> bool:
    """Return whether a sweep is a new one in its folder, because no result of an earlier one is left there.

    Args:
        output: the folder.
        now: identity of the new sweep, with its id (`sweep_id`).
    """
    return now.sweep != recorded_sweep(output)


def write_identity(output: Path, now: Identity) -> None:
    """Record the data and base of a sweep, unless there are results whose data and base are recorded."""
    if not _left(output):
        now.write(output / IDENTITY_FILE)
    elif not (output / IDENTITY_FILE).is_file():
        # All results are of rayft 0.1.0, which recorded nothing.
        now.model_copy(update={"rayft": ""}).write(output / IDENTITY_FILE)


def _left(output: Path) -> dict[Path, Identity]:
    """Return the folder of each trial that has left a result or checkpoint → the data and base of that."""
    found = {folder: left_identity(folder) for folder in sorted((output / "trials").glob("*"))}
    return {folder: identity for folder, identity in found.items() if identity is not None}


def begun_by(output: Path) -> str:
    """Return the version of rayft that started a sweep; empty for 0.1.0."""
    found = _read(output)
    return found.rayft if found else ""


def not_used(output: Path, points: Sequence[Point]) -> list[str]:
    """Return a warning for each finished trial in a sweep's folder that is not one of the sweep's points.

    This happens on a machine with other cores or another precision, where `auto` becomes other values, and
    where the configuration lies in another folder, since paths in it become absolute.
    """
    keys, runs = {point.key for point in points}, {point.name: point.run for point in points}
    others = {path.parent.name for path in (output / "trials").glob("*/result.json")}
    others = {name for name in others if "@" not in name} - keys
    if not others:
        return []
    why = dict.fromkeys(sorted(others), "")
    try:
        trials = SweepRecord.load(output).trials
    except ReportError:
        trials = ()
    for trial in trials:
        key = Path(trial.folder).parent.name
        if key in why and trial.id in runs:
            now = leaves(runs[trial.id])
            changed = [name for name in now if trial.settings.get(name) not in (None, now[name])]
            shown = ", ".join(f"{name} was {trial.settings[name]}, now {now[name]}" for name in changed)
            why[key] = f" ({shown})" if shown else ""
    return [
        f"{output / 'trials' / key} is not used again: it has other settings{reason}"
        for key, reason in why.items()
    ]


def _read(output: Path) -> Identity | None:
    path = output / IDENTITY_FILE
    if not path.is_file():
        return None
    try:
        return Identity.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"{path} is damaged, or of a later version of rayft, so the data and base of the results "
            "beside it are not known. Nothing was changed. Restore it from a copy; or delete it, so that the "
            "record of each trial is compared instead; or choose another folder with --set output=…"
        ) from error


def _recorded(output: Path) -> list[Identity]:
    """Return the data that rayft 0.1.0 recorded for a sweep that ended."""
    try:
        return [Identity(data=SweepRecord.load(output).data_digest)]
    except ReportError:
        return []

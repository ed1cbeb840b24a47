"""What a sweep's folder follows from, compared with what is there now before anything of it is used again.

config.yaml      its first line has the hash of the configuration (`rayft.flow.sweep.preflight`)
identity.json    data and base; rayft 0.1.0 did not write it, so there its adapters are asked
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from rayft.config import leaves
from rayft.data.source import read
from rayft.errors import ConfigError, ReportError
from rayft.identity import Identity
from rayft.models.fingerprint import source_fingerprint
from rayft.models.load import ModelConfig, load_skeleton, resolve
from rayft.report.record import SweepRecord
from rayft.sweep.result import left_identity
from rayft.sweep.space import Point
from rayft.train.identity import identify
from rayft.train.run import RunConfig

__all__ = [
    "IDENTITY_FILE",
    "begun_by",
    "check_identity",
    "current_identity",
    "not_used",
    "recorded_sweep",
    "sweep_id",
    "write_identity",
]

IDENTITY_FILE = "identity.json"


OTHER_FOLDER = "choose another folder with --set output=…, or delete that one"


def check_identity(
    output: Path, now: Identity, model: ModelConfig, otherwise: str = OTHER_FOLDER
) -> Identity:
    """Refuse to use what a sweep's folder holds if its data or base have changed since.

    A folder in which no trial has left anything is fit for any data and base.

    Args:
        output: the sweep's folder, or one that is still to be made.
        now: data and base as they are now.
        model: the base.
        otherwise: what can be done where the former data and base are gone.

    Returns:
        `now`, with a fingerprint to compare where results of rayft 0.1.0 have one.

    Raises:
        ConfigError: naming what has changed, or what was not recorded. Nothing is touched.
    """
    left = _left(output)
    if not left:
        return now
    before = _read(output)
    known = [*([before] if before else _recorded(output)), *left.values()]
    fingerprints = [one.fingerprint for one in known if one.fingerprint and not one.base]
    if fingerprints:
        own = source_fingerprint(load_skeleton(model), resolve(model), model.revision)
        # Where files can't tell, the lanes compare when they have loaded the base.
        now = now.model_copy(update={"fingerprint": own or fingerprints[0]})
    changed = next((found for one in known if (found := one.differences(now))), [])
    if changed:
        raise ConfigError(
            f"{output} holds results that can't be used with what is there now: {'; '.join(changed)}. "
            f"Nothing was touched. Put back what it was, {otherwise}"
        )
    recorded = {
        "data": any(one.data for one in known),
        "base": any(one.base or one.fingerprint for one in known),
    }
    if not all(recorded.values()):
        lacking = " and ".join(what for what, is_known in recorded.items() if not is_known)
        raise ConfigError(
            f"{', '.join(map(str, left))}: rayft 0.1.0 did not record which {lacking} this was trained with, "
            f"so it can't be used again. Nothing was touched. Delete it to train it again, {otherwise}"
        )
    return now


def current_identity(run: RunConfig, sweep: Path | None = None) -> Identity:
    """Read a run's data and give the identity of data and base, as they are now.

    Args:
        run: names both.
        sweep: the folder of the sweep whose configuration the run is of; it must be of the same.

    Raises:
        ConfigError: if the sweep was of other data or another base.
        DataError, ModelError: if one of them can't be read.
    """
    now = identify(run, read(run.data))
    if sweep is not None:
        now = check_identity(sweep, now, run.model, "or name other data or another base with --config")
    if not now.fingerprint:
        known = source_fingerprint(load_skeleton(run.model), resolve(run.model), run.model.revision)
        now = now.model_copy(update={"fingerprint": known or ""})
    return now


def sweep_id(output: Path, now: Identity) -> str:
    """Return the id of the sweep in a folder, a new one where another sweep begins there.

    It is empty for a sweep that was begun before sweeps had one.
    """
    before = _read(output)
    if before is not None and (before.sweep or _left(output)) and not before.differences(now):
        return before.sweep
    return "" if _left(output) else uuid.uuid4().hex[:12]


def recorded_sweep(sweep: Path | None) -> str:
    """Return the id that a sweep made for itself; empty where there is no sweep, or one of rayft 0.1.0."""
    found = _read(sweep) if sweep is not None else None
    return found.sweep if found else ""


def write_identity(output: Path, now: Identity) -> None:
    """Record what a sweep follows from, unless what trials have left follows from a record that is there."""
    if not _left(output):
        now.write(output / IDENTITY_FILE)
    elif not (output / IDENTITY_FILE).is_file():
        # All that is there is of rayft 0.1.0, which recorded nothing.
        now.model_copy(update={"rayft": ""}).write(output / IDENTITY_FILE)


def _left(output: Path) -> dict[Path, Identity]:
    """Collect what the trials of a sweep's folder follow from, of those that have left something."""
    found = {folder: left_identity(folder) for folder in sorted((output / "trials").glob("*"))}
    return {folder: identity for folder, identity in found.items() if identity is not None}


def begun_by(output: Path) -> str:
    """Return the version of rayft that began a sweep; empty for 0.1.0."""
    found = _read(output)
    return found.rayft if found else ""


def not_used(output: Path, points: Sequence[Point]) -> list[str]:
    """Return a warning for each finished trial in a sweep's folder that is none of the sweep's points.

    A machine with other cores or another precision settles other values, and paths are absolute.
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
            told = ", ".join(f"{name} was {trial.settings[name]}, now {now[name]}" for name in changed)
            why[key] = f" ({told})" if told else ""
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
            f"{path} is damaged, or of a later version of rayft, so it can't tell which data and base the "
            "results beside it are of. Nothing was touched. Put back a copy; or delete it, so that each "
            "trial's own record of data and base is compared; or choose another folder with --set output=…"
        ) from error


def _recorded(output: Path) -> list[Identity]:
    """Return what rayft 0.1.0 recorded of a sweep that ended."""
    try:
        return [Identity(data=SweepRecord.load(output).data_digest)]
    except ReportError:
        return []

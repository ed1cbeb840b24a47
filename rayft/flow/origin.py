"""Where an adapter folder comes from: the sweep that it lies in, its trial there, and its tracked run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, ReportError
from rayft.flow.config import TrainConfig, load_train_config
from rayft.flow.sweep.folder import RECORD_FILE, STAMP_FILE, is_sweep, sweep_above
from rayft.report.record import SweepRecord, TrialRecord
from rayft.tracking.base import TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.mlflow import find_adapter, prepare, resolve_runs

__all__ = ["Origin", "find_folder", "find_origin", "mlflow_uri", "sweep_tracker"]


@dataclass(frozen=True)
class Origin:
    """What is known about an adapter folder besides its content."""

    name: str
    """Name of its trial, or of the folder if there is no trial."""
    config: TrainConfig | None = None
    """Configuration that names its base and data; None if none is known."""
    lr: float | None = None
    """Learning rate of its trial."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Configuration of its trial: leaf → value."""
    run_id: str = ""
    """Tracked run of its trial; empty if there is none."""
    tracker: TrackerSpec | None = None
    """Where results made from the folder are tracked; None if nowhere."""
    sweep: Path | None = None
    """Folder of the sweep that `config` comes from; None if it comes from elsewhere."""
    note: str = ""
    """Why its trial was not looked up in the sweep's record; empty if it was."""


def find_folder(folder: Path) -> Path:
    """Return the adapter folder that a path stands for.

    It is the path itself, or in an output folder the winner of the sweep or the adapter of the run.

    Raises:
        ArtifactError: if the sweep or run has none.
    """
    if not is_sweep(folder):
        return folder
    for name in ("winner", "adapter"):
        if (folder / name).is_dir():
            return folder / name
    raise ArtifactError(
        f"the sweep or run in {folder} has no winner: let it end first, or give the adapter of one of its "
        "trials (a folder trials/…/adapter)"
    )


def find_origin(folder: Path, artifact: AdapterArtifact, config: Path | None) -> Origin:
    """Find the sweep that an adapter folder lies in, its trial there, and its tracked run.

    Args:
        folder: the adapter folder.
        artifact: its content.
        config: file of a configuration to use instead of the sweep's.

    Raises:
        ConfigError: if the configuration is wrong.
    """
    sweep = sweep_above(folder)
    stamp = config or (sweep / STAMP_FILE if sweep is not None else None)
    settings = load_train_config(stamp) if stamp is not None else None
    own = sweep if config is None else None
    trial, note = None, ""
    try:
        trial = _trial(sweep, folder) if sweep is not None else None
    except ReportError as error:
        note = f"what the sweep recorded of the adapter's trial was not used: {error}"
    spec = _tracker(settings, sweep)
    if trial is None:
        hashes = [known for known in (artifact.content_hash, artifact.meta.parent) if known]
        run_id = find_adapter(spec, hashes) if spec is not None else ""
        return Origin(folder.resolve().name, settings, run_id=run_id, tracker=spec, sweep=own, note=note)
    run_id = resolve_runs(spec, [trial.run_id])[trial.run_id] if spec is not None else trial.run_id
    return Origin(trial.id, settings, trial.lr, trial.settings, run_id, spec, own)


def sweep_tracker(sweep: Path) -> TrackerSpec:
    """Return where a sweep tracks and registers, according to the configuration in its folder.

    Raises:
        ConfigError: if that can't be read.
        TrackingError: if it names no URI that MLflow accepts.
    """
    stamp = sweep / STAMP_FILE
    return tracker_spec(load_train_config(stamp).tracking if stamp.is_file() else TrackingConfig(), sweep)


def mlflow_uri(uri: str | None, sweep: Path | None) -> str:
    """Return the URI of MLflow: the given one, else that of a sweep, else MLFLOW_TRACKING_URI.

    Args:
        uri: what the user gave.
        sweep: folder of a sweep.

    Raises:
        ConfigError, TrackingError: as `sweep_tracker`.
    """
    if uri is None and sweep is not None:
        return sweep_tracker(sweep).uri
    return tracker_spec(TrackingConfig(uri=uri), Path.cwd()).uri


def _tracker(settings: TrainConfig | None, sweep: Path | None) -> TrackerSpec | None:
    """Return where to track: with the sweep if there is one, otherwise at MLFLOW_TRACKING_URI."""
    if sweep is not None and settings is not None:
        return prepare(tracker_spec(settings.tracking, sweep))
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return prepare(tracker_spec(settings.tracking if settings else TrackingConfig(), Path.cwd()))
    return None


def _trial(sweep: Path, folder: Path) -> TrialRecord | None:
    """Return the trial in a sweep's record that an adapter folder is of, or was derived from.

    A run that `rayft train` has trained, and a sweep that has not ended yet, have no record.

    Raises:
        ReportError: if the record is damaged.
    """
    if not (sweep / RECORD_FILE).is_file():
        return None
    record = SweepRecord.load(sweep)
    place = folder.resolve()
    trials = {trial.id: trial for trial in record.trials}
    for trial in record.trials:
        if trial.folder and Path(trial.folder).resolve() == place:
            return trial
    for item in record.squeezed:
        if item.folder and Path(item.folder).resolve() == place:
            return trials[item.trial]
    if record.winner is not None and place == (sweep / "winner").resolve():
        return trials[record.winner.trial]
    return None

"""Where an adapter folder comes from: the sweep around it, its trial, its base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayft.artifacts import AdapterArtifact
from rayft.errors import ModelError, ReportError
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.sweep.preflight import STAMP_FILE, is_sweep
from rayft.models.fingerprint import source_fingerprint
from rayft.models.load import ModelConfig, is_here, load_skeleton, resolve
from rayft.models.targets import linear_shapes
from rayft.report.record import SweepRecord, TrialRecord
from rayft.tracking.base import TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.mlflow import find_adapter, prepare, resolve_runs
from rayft.train.run import RunConfig

__all__ = ["Origin", "check_base", "find_origin"]


@dataclass(frozen=True)
class Origin:
    """What is known of a folder beside what is in it."""

    name: str
    """Its trial's name, or the folder's."""
    config: PipelineConfig | None = None
    lr: float | None = None
    """Learning rate of its trial."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Its trial's configuration, leaf by leaf."""
    run_id: str = ""
    """Its trial's run in the tracker."""
    tracker: TrackerSpec | None = None
    """Where squeezes of it are tracked; None if nowhere."""
    sweep: Path | None = None
    """The sweep whose configuration `config` is; None if it is another, or there is none."""


def find_origin(folder: Path, artifact: AdapterArtifact, config: Path | None) -> Origin:
    """Look for the sweep that a folder lies in, and for its trial there and in the tracker.

    Args:
        folder: the adapter folder.
        artifact: what is in it.
        config: a configuration to use instead of the sweep's.

    Raises:
        ConfigError: if the configuration is wrong.
    """
    sweep = next((above for above in folder.resolve().parents if is_sweep(above)), None)
    stamp = config or (sweep / STAMP_FILE if sweep is not None else None)
    settings = load_config(stamp) if stamp is not None else None
    own = sweep if config is None else None
    trial = _trial(sweep, folder) if sweep is not None else None
    spec = _tracker(settings, sweep)
    if trial is None:
        hashes = [known for known in (artifact.content_hash, artifact.meta.parent) if known]
        run_id = find_adapter(spec, hashes) if spec is not None else ""
        return Origin(folder.resolve().name, settings, run_id=run_id, tracker=spec, sweep=own)
    run_id = resolve_runs(spec, [trial.run_id])[trial.run_id] if spec is not None else trial.run_id
    return Origin(trial.id, settings, trial.lr, trial.settings, run_id, spec, own)


def check_base(artifact: AdapterArtifact, base: str | None, run: RunConfig | None) -> str:
    """Refuse a base that the adapter was not made for; its weights are not loaded.

    Where no base is given, the one that the adapter names is used, if it is on this machine.

    Returns:
        Why the names of the adapter's modules could not be checked; empty if they were.

    Raises:
        BaseMismatchError: naming what differs.
        ModelError: if a base that was given can't be found.
    """
    model = ModelConfig(name=base, task=artifact.meta.task) if base else run.model if run else None
    if model is not None:
        skeleton = load_skeleton(model)
        known = source_fingerprint(skeleton, resolve(model), model.revision)
        artifact.check_base(known or "", linear_shapes(skeleton))
        return ""
    named = artifact.meta.base_model
    if not named:
        return "the adapter names no base, so its module names were not checked; give one with --base"
    try:
        skeleton = _named_skeleton(artifact) if is_here(named) else None
    except ModelError:
        skeleton = None
    if skeleton is None:
        return f"its base {named} is not here, so its module names were not checked; give one with --base"
    artifact.check_base("", linear_shapes(skeleton))
    return ""


def _named_skeleton(artifact: AdapterArtifact) -> Any:
    """Make the base that an adapter names; None where its own class is not that of the task."""
    model = ModelConfig(name=artifact.meta.base_model, task=artifact.meta.task)
    skeleton = load_skeleton(model)
    # Part of a larger model (a vision model's text) has other names than the adapter was trained with.
    own = skeleton.config.architectures or [type(skeleton).__name__]
    return skeleton if model.task != "causal_lm" or type(skeleton).__name__ in own else None


def _tracker(settings: PipelineConfig | None, sweep: Path | None) -> TrackerSpec | None:
    """Find where to track: the sweep's place, else MLFLOW_TRACKING_URI."""
    if sweep is not None and settings is not None:
        return prepare(tracker_spec(settings.tracking, sweep))
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return prepare(tracker_spec(settings.tracking if settings else TrackingConfig(), Path.cwd()))
    return None


def _trial(sweep: Path, folder: Path) -> TrialRecord | None:
    """Find a folder's trial in the sweep's record."""
    try:
        record = SweepRecord.load(sweep)
    except ReportError:
        return None
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

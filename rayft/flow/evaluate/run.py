"""Evaluate adapters and models: `rayft eval`, and the function for Python programs behind it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rayft.flow.config import TrainConfig
from rayft.flow.evaluate.data import OnData
from rayft.flow.evaluate.keep import keep, trained_in
from rayft.flow.evaluate.record import Evaluation, check_replaceable, differences
from rayft.flow.evaluate.request import (
    EvaluateRequest,
    Known,
    check_request,
    chosen,
    known,
    models_of,
    scored_settings,
    sweeps_of,
)
from rayft.flow.evaluate.tasks import Checked, InProcess, OnServer
from rayft.flow.evaluate.tracking import evaluation_key, track_evaluation
from rayft.flow.sweep.folder import is_sweep
from rayft.flow.target import Target, find_targets
from rayft.paths import check_file
from rayft.tracking.base import TrackerSpec
from rayft.tracking.mlflow import MlflowTracker, find_adapter, flush_spool, prepare

__all__ = ["evaluate"]


def evaluate(request: EvaluateRequest, say: Callable[[str], None] = lambda _: None) -> Evaluation:
    """Score one target, or compare two, in this process: on the data of a configuration, or on tasks.

    Args:
        request: what to evaluate.
        say: called with sentences for the user.

    Raises:
        RayftError: naming what is wrong and what to do. Options, targets, their base, data and tasks are
            checked before weights are loaded, and nothing is written.
    """
    check_request(request)
    if request.out is not None:
        check_file(request.out, "--out")
        check_replaceable(request.out, overwrite=request.overwrite)
    about = known(request)
    with tempfile.TemporaryDirectory() as scratch:
        targets: list[Target] = []
        if request.url is None:
            targets = find_targets(request.targets, request.rank, about.place.uri, Path(scratch))
        checked = _checked(request, about, targets, say)
        spec = prepare(about.place) if about.tracked else None
        found = checked.run()
    found = found.model_copy(update={"differences": differences(found.targets)})
    if request.out is not None:
        found.write(request.out)
    settings = dict(scored_settings(request, about))
    key = evaluation_key(found, settings)
    runs: list[str] = []
    if spec is not None:
        runs = _track(spec, request, found, key, settings)
    else:
        say("not tracked: name an MLflow server with --uri or MLFLOW_TRACKING_URI")
    for sweep in sweeps_of(request) or _sweep_that_trained(about, runs):
        keep(found, key, chosen(request), sweep, say)
    return found


def _checked(
    request: EvaluateRequest, about: Known, targets: list[Target], say: Callable[[str], None]
) -> Checked:
    """Check everything that can be checked without weights."""
    if request.url is not None:
        return OnServer(request, about)
    models = models_of(targets, request, about)
    if request.tasks:
        return InProcess(request, about, targets, models)
    assert isinstance(about.settings, TrainConfig)
    run, part = about.settings.run(), request.part or "test"
    on_data = OnData(targets, models, run, about.sweep, part, request.samples)
    for text in on_data.dropped:
        say(text)
    return on_data


def _track(
    spec: TrackerSpec, request: EvaluateRequest, found: Evaluation, key: str, settings: dict[str, str]
) -> list[str]:
    """Track an evaluation, and return the runs that made the first target: the nearest first."""
    first = found.targets[0]
    # Of a server's adapter at a lower rank, the whole one was trained.
    hashes = [one for one in (first.content.partition("@")[0], first.parent) if one]
    runs = [run for one in hashes if (run := find_adapter(spec, [one]))]
    with MlflowTracker(spec) as tracker:
        track_evaluation(tracker, found, key, settings, next(iter(runs), None), request.out)
    flush_spool(spec)
    return runs


def _sweep_that_trained(about: Known, runs: Sequence[str]) -> list[Path]:
    """Return the sweep of the configuration if it has one of the runs among its trials."""
    if not isinstance(about.settings, TrainConfig):
        return []
    folder = about.settings.folder.resolve()
    return [folder] if is_sweep(folder) and trained_in(folder, runs) else []

"""The search: Ray Tune decides which trials start and which stop; an executor runs them.

A Tune trial computes nothing itself. Its `step` waits for the trial's next evaluation from the broker. Tune
looks at the number and calls `step` again, which lets the lane continue. Our ASHA scheduler itself cancels
the trials that it stops at the broker, so a search that ends for another reason stops no trial. A trial that
ended in an earlier, interrupted sweep is replayed from its result, and a trial that was in progress from the
curve in its checkpoint, so nothing is trained twice. ASHA's earlier decisions, and their order, are in the
sweep's event log (`rayft.sweep.decisions`).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray import tune

from rayft.errors import TrainError
from rayft.identity import UNKNOWN, Identity
from rayft.sweep.asha import RecordedASHA
from rayft.sweep.decisions import EVENTS_FILE, EventLog, rungs
from rayft.sweep.executor import Executor
from rayft.sweep.jobs import Event, Job
from rayft.sweep.request import TrainRequest
from rayft.sweep.result import TrialResult, read_result, trial_folder
from rayft.sweep.space import Point, SweepConfig
from rayft.sweep.trial_actor import Evaluation, Start, TrialActor
from rayft.tracking.base import TrackerSpec
from rayft.train.course import TrainResult

__all__ = ["Trial", "earlier", "search"]


@dataclass(frozen=True)
class Trial:
    """A trial that has ended."""

    point: Point
    result: TrainResult | None = None
    """None if the trial failed."""
    run_id: str = ""
    error: str = ""
    """Why the trial failed."""

    @property
    def status(self) -> str:
        """`finished`, `stopped` (by the search) or `failed` (to train, or to be scored)."""
        if self.result is None or self.error:
            return "failed"
        return "finished" if self.result.finished else "stopped"


def search(
    sweep: SweepConfig,
    trials: Sequence[Point],
    executor: Executor,
    output: Path,
    *,
    tracker: TrackerSpec | None = None,
    parent: str | None = None,
    identity: Identity = UNKNOWN,
    check: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """Run the trials under ASHA and return them as they ended, in the order of `trials`.

    Trials that can share a lane's steps begin before those that take turns. The decisions of an earlier,
    interrupted search in `output` are repeated.

    Args:
        sweep: the search's settings.
        trials: the points of the space.
        executor: runs the trials; it is started if there is something to train.
        output: the sweep's folder.
        tracker: where the lanes track the trials; by default nowhere.
        parent: tracked run of the sweep.
        identity: identity of data and base, with which the lanes' own and those of earlier results are
            compared; by default they are not compared.
        check: called between the search's own steps; an exception that it raises ends the search.

    Raises:
        ResourceError: if no trial can go on, because the disk is full.
        ray.exceptions.RayError: if a process that the trials share has died.
    """
    packs = executor.slots != 1
    requests = [_request(point, output, sweep, tracker, parent, identity, packs=packs) for point in trials]

    def stop(key: str, step: int) -> None:
        ray.get(executor.broker.cancel.remote(key, step))

    asha = RecordedASHA(sweep, trials[0].run.optim.steps, EventLog(output / EVENTS_FILE), stop)
    # Those that take turns come last. Tune runs a fixed number of trials at the same time: if some of them
    # waited for their turn, slots would stay empty.
    order = sorted(requests, key=lambda request: not request.pack)
    waiting = [request for request in order if _unfinished(request)]
    if waiting:
        executor.start()
        executor.forget([request.key for request in waiting])
        at_once = executor.at_once(packs=any(one.pack for one in waiting))
        # Tune starts a process for each trial before it submits its job. Jobs that begin together must not
        # wait for that, or a lane would take them up one by one.
        executor.submit([Job.of(one.key, one, pack=one.pack) for one in waiting[:at_once] if one.pack])
        _run_tune(sweep, lambda: _tuner(sweep, order, executor, asha, check, at_once))
    return [
        _collect(point, request, executor, output) for point, request in zip(trials, requests, strict=True)
    ]


def _request(
    point: Point,
    output: Path,
    sweep: SweepConfig,
    tracker: TrackerSpec | None,
    parent: str | None,
    identity: Identity,
    *,
    packs: bool,
) -> TrainRequest:
    return TrainRequest(
        key=point.key,
        name=point.name,
        run=point.run,
        output=str(output),
        evaluate_at=tuple(rungs(sweep, point.run.optim.steps)),
        packs=packs,
        tracker=tracker,
        parent=parent,
        expected=identity,
    )


class _Watch(tune.Callback):
    """Ends the search when it is interrupted, or when the broker, which every trial needs, has died.

    A trial whose process in Tune has died too often is trained without decisions.
    """

    def __init__(self, broker: Any, check: Callable[[], None]) -> None:
        self._broker, self._check = broker, check

    def on_step_begin(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
        self._check()

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        # Otherwise its lane would wait for the next decision, and others for the lane.
        ray.get(self._broker.leave.remote(trial.config["trial"].job.id))


def _tuner(
    sweep: SweepConfig,
    requests: Sequence[TrainRequest],
    executor: Executor,
    asha: RecordedASHA,
    check: Callable[[], None],
    at_once: int,
) -> tune.Tuner:
    _quiet_tune()
    # Tune's trials take no CPU, since the lanes may have reserved all of them, and run on this node, since
    # another one may be lost.
    here = f"node:{ray.util.get_node_ip_address()}"
    trainable = tune.with_resources(
        tune.with_parameters(TrialActor, entrance=executor.entrance), {"cpu": 0, here: 1e-3}
    )
    return tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search([_start(request) for request in requests])},
        tune_config=tune.TuneConfig(
            scheduler=asha,
            max_concurrent_trials=at_once,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=executor.storage,
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            # The failure of a trial is an event; this is for its process in Tune, which has no state.
            failure_config=tune.FailureConfig(max_failures=sweep.restarts),
            callbacks=[_Watch(executor.broker, check)],
        ),
    )


def _run_tune(sweep: SweepConfig, tuner: Callable[[], tune.Tuner]) -> None:
    """Run Tune, and run it again if it ends because Ray's memory monitor has killed a Tune trial's process.

    The lanes continue training meanwhile, and the recorded decisions are repeated.

    Raises:
        ray.exceptions.OutOfMemoryError: if this happens more than `sweep.restarts` times.
    """
    for attempt in range(sweep.restarts + 1):
        try:
            tuner().fit()
        except RuntimeError as error:
            # If a trial's process dies for any other reason, Tune itself starts it again.
            cause = error.__cause__
            if not isinstance(cause, ray.exceptions.OutOfMemoryError):
                raise
            if attempt == sweep.restarts:
                raise cause from None
        else:
            return


def _collect(point: Point, request: TrainRequest, executor: Executor, output: Path) -> Trial:
    """Wait until a trial has ended, and read its result."""
    try:
        left = earlier(request)
    except TrainError as changed:
        return Trial(point, error=str(changed))
    if left is None:
        event: Event | None = ray.get(executor.broker.result.remote(point.key))
        if event is None or event.kind != "final":
            if event is not None:
                event.raise_fatal()
            error = event.error or "interrupted" if event else "it was never started"
            return Trial(point, error=error)
        left = read_result(str(output), point.key)
        assert left is not None
    return Trial(point, result=left.result, run_id=left.run_id)


def earlier(request: TrainRequest) -> TrialResult | None:
    """Read the result of a trial that ended earlier; return None if there is none.

    Raises:
        TrainError: if the result follows from something else than the request.
    """
    left = read_result(request.output, request.key)
    if left is None:
        return None
    changed = left.identity.differences(request.identity)
    if changed:
        folder = trial_folder(request.output, request.key)
        raise TrainError(f"{folder} holds a result that can't be used again: {'; '.join(changed)}")
    return left


def _unfinished(request: TrainRequest) -> bool:
    """Return whether a trial still has to be trained."""
    try:
        return earlier(request) is None
    except TrainError:
        # Its result follows from something else; `_collect` makes the trial fail with the reason.
        return False


def _start(request: TrainRequest) -> Start:
    """Return how a trial begins: anew, from a checkpoint, or not at all, because it has ended before."""
    run = request.run
    # An annealed trial can't keep what it found at a higher rank.
    best = run.evaluate.keep == "best" and run.anneal is None
    try:
        left = earlier(request)
    except TrainError:
        # Its result follows from something else, for which `_collect` makes the trial fail.
        over = [Evaluation(0, math.nan, done=True)]
    else:
        over = _whole_curve(left.result) if left else []
    checkpoint = trial_folder(request.output, request.key) / "checkpoint"
    return Start(Job.of(request.key, request, pack=request.pack), checkpoint, over, best)


def _whole_curve(result: TrainResult) -> list[Evaluation]:
    """Return the evaluations of a trial that has ended."""
    before = [Evaluation(step, loss, done=False) for step, loss in result.val_curve if step < result.steps]
    return [*before, Evaluation(result.steps, result.val_loss, done=True)]


def _quiet_tune() -> None:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # `rayft.flow.interrupt` handles the signal, because an interrupted trial is not a stopped one.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    for name in ("ray.tune", "ray.train", "ray.train.v2"):
        # The broker reports the errors that Tune and Train log (a trial or a worker group that failed).
        logging.getLogger(name).setLevel(logging.CRITICAL)

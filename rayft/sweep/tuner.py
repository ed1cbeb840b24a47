"""The search: Ray Tune decides which trials start and which stop; an executor runs them.

A Tune trial does no work itself. Its `step` waits for the trial's next evaluation from the broker; Tune looks
at the number and calls `step` again, which is how the lane hears that it may go on. ASHA itself tells the
broker which trials stop, so that a search that ends for another reason stops none. A trial that ended in an
earlier, interrupted sweep is replayed from its result, one that was under way from its checkpoint's curve, so
nothing is trained twice; what ASHA decided then, in which order, is in the sweep's event log
(`rayft.sweep.schedule`).
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
from rayft.sweep.broker import Event, Job
from rayft.sweep.executor import Executor
from rayft.sweep.lane import TrainRequest
from rayft.sweep.result import read_result, result_identity
from rayft.sweep.schedule import EVENTS_FILE, EventLog, rungs
from rayft.sweep.space import Point, SweepConfig
from rayft.tracking.base import TrackerSpec
from rayft.train.checkpoint import last_curve
from rayft.train.context import trial_folder

__all__ = ["Trial", "earlier", "search"]


@dataclass(frozen=True)
class Trial:
    """A trial that has ended."""

    point: Point
    result: dict[str, Any] | None = None
    """`TrainResult` as a mapping; None if it failed."""
    run_id: str = ""
    error: str = ""
    """Why it failed."""

    @property
    def status(self) -> str:
        """`finished`, `stopped` (by the search) or `failed` (to train, or to be scored)."""
        if self.result is None or self.error:
            return "failed"
        return "finished" if self.result["finished"] else "stopped"


class TrialActor(tune.Trainable):
    """A Tune trial: waits for a lane's reports."""

    def setup(self, config: dict[str, Any], *, executor: Executor | None = None) -> None:
        """Queue the trial, or get ready to replay it."""
        assert executor is not None
        self._executor = executor
        self._replay: list[Event] = []
        self._seen = 0
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in the same process: it starts in milliseconds."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation."""
        if self._replay:
            event = self._replay.pop(0)
        else:
            event = ray.get(self._broker.next_event.remote(self._key, self._seen))
            self._seen = event.number
        result = event.values.get("result", {})
        # A trial that failed ends too: `_collect` says why, and Tune prints no traceback for it.
        loss = event.values.get("val_loss", result.get("val_loss", math.nan))
        return {"step": event.step, "val_loss": loss, "done": event.kind != "report"}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep nothing: the lane keeps the trial's checkpoint."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing: the lane resumes the trial."""

    def _begin(self, config: dict[str, Any]) -> None:
        request: TrainRequest = config["request"]
        self._broker, self._key = self._executor.broker, request.key
        self._seen = 0
        ended = _ended(request)
        self._replay = ended or _half_way(request)
        if not ended:
            self._executor.submit([Job.of(request.key, "train", request)])


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
    """Run the trials under ASHA and give what became of each, in the order of `trials`.

    The decisions of an earlier, interrupted search in `output` are repeated.

    Args:
        sweep: the search's settings.
        trials: the points of the space.
        executor: started.
        output: the sweep's folder.
        tracker: where the lanes track; not at all where not given.
        parent: tracking run of the sweep.
        identity: of data and base, which the lanes and earlier results are compared with; not compared where
            not given.
        check: called between the search's own steps; what it raises ends the search.

    Raises:
        ResourceError: if no trial can go on, because the disk is full.
        ray.exceptions.RayError: if a process that the trials share has died.
    """
    requests = [_request(point, output, sweep, tracker, parent, identity) for point in trials]

    def stop(key: str, step: int) -> None:
        ray.get(executor.broker.cancel.remote(key, step))

    asha = RecordedASHA(sweep, trials[0].run.optim.steps, EventLog(output / EVENTS_FILE), stop)
    if any(map(_unfinished, requests)):
        executor.start()
        _run_tune(sweep, lambda: _tuner(sweep, requests, executor, asha, check))
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
) -> TrainRequest:
    return TrainRequest(
        key=point.key,
        name=point.name,
        run=point.run.model_dump_json(),
        output=str(output),
        evaluate_at=tuple(rungs(sweep, point.run.optim.steps)),
        tracker=tracker,
        parent=parent,
        expected=identity,
    )


class _Watch(tune.Callback):
    """Ends the search when it is interrupted, or when the broker has died, without which no trial goes on."""

    def __init__(self, broker: Any, check: Callable[[], None]) -> None:
        self._broker, self._check = broker, check

    def on_step_begin(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
        self._check()

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        ray.get(self._broker.snapshot.remote())


def _tuner(
    sweep: SweepConfig,
    requests: Sequence[TrainRequest],
    executor: Executor,
    asha: RecordedASHA,
    check: Callable[[], None],
) -> tune.Tuner:
    _quiet_tune()
    # No CPU, which the lanes may have taken all; and no other node than this one, which could be lost.
    here = f"node:{ray.util.get_node_ip_address()}"
    trainable = tune.with_resources(
        tune.with_parameters(TrialActor, executor=executor), {"cpu": 0, here: 1e-3}
    )
    return tune.Tuner(
        trainable,
        param_space={"request": tune.grid_search(requests)},
        tune_config=tune.TuneConfig(
            scheduler=asha,
            max_concurrent_trials=executor.lanes,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=executor.storage,
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            # A trial's own failure is an event; this is for its process in Tune, which holds nothing.
            failure_config=tune.FailureConfig(max_failures=sweep.restarts),
            callbacks=[_Watch(executor.broker, check)],
        ),
    )


def _run_tune(sweep: SweepConfig, tuner: Callable[[], tune.Tuner]) -> None:
    """Run Tune, and again if it ends because Ray's memory monitor has killed the process of a Tune trial.

    The lanes continue training meanwhile, and the decisions that were recorded are repeated.

    Raises:
        ray.exceptions.OutOfMemoryError: if that has happened more often than `sweep.restarts` times.
    """
    for attempt in range(sweep.restarts + 1):
        try:
            tuner().fit()
        except RuntimeError as error:
            # Tune starts a trial's process again if it dies for any other reason.
            cause = error.__cause__
            if not isinstance(cause, ray.exceptions.OutOfMemoryError):
                raise
            if attempt == sweep.restarts:
                raise cause from None
        else:
            return


def _collect(point: Point, request: TrainRequest, executor: Executor, output: Path) -> Trial:
    """Wait until a trial's lane has let go of it, and read its result."""
    try:
        values = earlier(request)
    except TrainError as changed:
        return Trial(point, error=str(changed))
    if values is None:
        event: Event | None = ray.get(executor.broker.result.remote(point.key))
        if event is None or event.kind != "final":
            if event is not None:
                event.raise_fatal()
            error = str(event.values.get("error", "interrupted")) if event else "it was never started"
            return Trial(point, error=error)
        values = read_result(str(output), point.key)
        assert values is not None
    return Trial(point, result=values["result"], run_id=values["run_id"])


def earlier(request: TrainRequest) -> dict[str, Any] | None:
    """Read what a trial has left, if it has ended.

    Raises:
        TrainError: if that follows from something else than the request.
    """
    values = read_result(request.output, request.key)
    if values is None:
        return None
    folder = trial_folder(request.output, request.key)
    changed = result_identity(folder, values).differences(request.identity)
    if changed:
        raise TrainError(f"{folder} holds a result that can't be used again: {'; '.join(changed)}")
    return values


def _unfinished(request: TrainRequest) -> bool:
    """Return whether something is left to be done for a trial."""
    try:
        return earlier(request) is None
    except TrainError:
        # Its result follows from something else; the trial fails with the reason.
        return False


def _ended(request: TrainRequest) -> list[Event]:
    """Return the events of a trial that has ended; none if it has not."""
    values = earlier(request)
    if values is None:
        return []
    result = values["result"]
    before = [(step, loss) for step, loss in result["val_curve"] if step < result["steps"]]
    return [*_reports(before), Event("final", result["steps"], {"result": result})]


def _half_way(request: TrainRequest) -> list[Event]:
    """Return the evaluations before a trial's checkpoint, at which its lane reports the next one."""
    return _reports(last_curve(trial_folder(request.output, request.key) / "checkpoint"))


def _reports(curve: Sequence[tuple[int, float]]) -> list[Event]:
    return [Event("report", step, {"val_loss": loss}) for step, loss in curve]


def _quiet_tune() -> None:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # An interrupt is not a stop: `rayft.flow.interrupt` takes it.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    for name in ("ray.tune", "ray.train", "ray.train.v2"):
        # What Tune and Train log as errors (a trial or a worker group that failed) is told by the broker.
        logging.getLogger(name).setLevel(logging.CRITICAL)

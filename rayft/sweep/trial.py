"""A trial in a lane: it trains the run, reports to the search and the tracker, and keeps the result."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from rayft.config import leaves
from rayft.errors import InterruptedRunError, RayftError
from rayft.files import disk_full
from rayft.methods.base import Method
from rayft.models.methods import method
from rayft.sweep.broker import Verdict
from rayft.sweep.jobs import NewGroupError
from rayft.sweep.request import TrainRequest, tracking_key
from rayft.sweep.result import TrialResult, file_hashes, trial_folder, write_result
from rayft.tracking.base import HASH_PARAM, Former, RunStatus
from rayft.train.course import Asked, Clock, Course, CrowdedError, TrainResult
from rayft.train.packed import Pack
from rayft.train.placement import DeviceMemoryError
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer

if TYPE_CHECKING:
    from rayft.sweep.lane import Lane
    from rayft.tracking.mlflow import MlflowTracker

__all__ = ["LaneReporter", "TrialCourse"]


class TrialCourse:
    """The course of a trial in a lane: that of its run, with what is checked before and kept after it.

    Args:
        request: the trial.
        lane: where it trains.
        session: base and data.
        started: when the lane began to work for the trial, by `time.perf_counter`.
        pack: the runs with which it takes its steps; by default it has the lane to itself.
    """

    def __init__(
        self, request: TrainRequest, lane: Lane, session: Session, started: float, pack: Pack | None = None
    ) -> None:
        self._request, self._lane, self._session = request, lane, session
        self.clock = Clock(started)
        self._home_folder = trial_folder(request.output, request.key)
        self._folder = lane.home.place(self._home_folder)
        with lane.worker.together():
            if lane.worker.rank == 0 and not self._kind.saves_model:
                lane.home.check(self._home_folder / "adapter")
        tracked = _TrackedRun.begin(request, lane) if lane.worker.rank == 0 else None
        self._tracked, self.reporter = tracked, LaneReporter(lane, request, tracked)
        try:
            self.trainer = Trainer(
                request.run,
                session,
                self.reporter,
                self._folder,
                request.evaluate_at,
                placement=request.placement,
                pack=pack,
                clock=self.clock,
            )
        except Exception as error:
            self._failed(error)
            raise

    def course(self) -> Generator[Asked, Any, TrialResult | None]:
        """Train, and write result.json; the first worker returns the result.

        Raises:
            RayftError: as `Trainer.fit`.
        """
        try:
            result = yield from self._trained()
            return self._keep(result) if self._lane.worker.rank == 0 else None
        except Exception as error:
            if (ended := self._failed(error)) is not None:
                raise ended from error
            raise

    def _trained(self) -> Course:
        try:
            return (yield from self.trainer.course())
        finally:
            if not self._kind.shares_base:
                # The run has changed the base, so the next trial can't use it. Loading it again takes
                # seconds, a new worker group half a minute.
                self._lane.forget()

    @property
    def _kind(self) -> Method:
        return method(self._request.run.method.name)

    def _keep(self, result: TrainResult) -> TrialResult:
        """Write the result, and send home what belongs to it."""
        request, lane, tracked, folder = self._request, self._lane, self._tracked, self._folder
        left = TrialResult(
            result=replace(result, folder=str(self._home_folder / Path(result.folder).name)),
            run_id=tracked.run_id if tracked else "",
            identity=self._session.identity.brief.model_copy(
                update={"config": request.run.hash, "start": result.start}
            ),
            hashes=file_hashes(Path(result.folder)) if self._kind.saves_model else {},
        )
        if tracked:
            tracked.finish(result)
        # If the run is tracked, the adapter may be sent to the tracking server later.
        lane.home.send(Path(result.folder), keep=tracked is not None and bool(result.content_hash))
        write_result(folder, left, lane.home)
        spent = result.seconds["total"] - result.seconds["overhead"]
        # All time that the lane spent on the trial beyond its steps and evaluations. Loading the base is part
        # of the lane's own start, which is paid once.
        overhead = self.clock() - spent
        left = left.with_seconds(overhead=overhead, waiting=self.reporter.waited)
        write_result(folder, left, lane.home)
        # The last checkpoint stays: the trial is trained again from it if its adapter should be damaged.
        lane.home.prune(folder / "checkpoint", 1)
        return left

    def _failed(self, error: Exception) -> NewGroupError | None:
        """Record that the trial has raised an error; return another error if a new group can go on."""
        request, lane, tracked = self._request, self._lane, self._tracked
        if isinstance(error, DeviceMemoryError) and error.placement is not None:
            return NewGroupError(str(error), replace(request, placement=error.placement))
        # On a full disk nothing can be recorded; the next start sets the tracked run running again.
        if disk_full(error):
            return None
        alone = isinstance(error, RayftError) and not error.everywhere
        if lane.worker.rank > 0 and alone and not isinstance(error, InterruptedRunError):
            # The first worker may never learn of it.
            tracked = _TrackedRun.begin(request, lane)
        if tracked:
            later = isinstance(error, InterruptedRunError | CrowdedError)
            tracked.end("interrupted" if later else "failed")
        return None


class _TrackedRun:
    """A trial's run in the tracker."""

    def __init__(self, tracker: MlflowTracker, run_id: str) -> None:
        self._tracker, self.run_id = tracker, run_id

    @classmethod
    def begin(cls, request: TrainRequest, lane: Lane) -> _TrackedRun | None:
        """Begin or continue the tracked run of a request; return None if it is not tracked."""
        if request.tracker is None:
            return None
        tracker, run = lane.tracker(request.tracker), request.run
        tags = {
            "rayft.kind": "trial" if request.parent else "run",
            "rayft.method": run.method.name,
            "rayft.rank": str(run.method.rank),
            "rayft.lane": lane.name,
        }
        key = tracking_key(request.key, request.expected)
        former = Former(request.key) if request.parent else None
        run_id = tracker.run(request.name, key, parent=request.parent, tags=tags, former=former)
        tracked = cls(tracker, run_id)
        try:
            tracker.params(run_id, leaves(run))
        except Exception:
            tracked.end("failed")
            raise
        return tracked

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the numbers of a step."""
        self._tracker.metrics(self.run_id, metrics, step)

    def finish(self, result: TrainResult) -> None:
        """Record the result, and end the run."""
        found = {
            "best_val_loss": min((value for _, value in result.val_curve), default=float("nan")),
            "trainable_parameters": result.trainable,
            "adapter_bytes": result.bytes,
        }
        self._tracker.metrics(self.run_id, found)
        # At step 0: if the end of a run is trained again because its result was lost, the first values stay.
        taken = {
            "train_tokens_per_second": result.tokens_per_second,
            "train_seconds": result.seconds["train"],
            "overhead_seconds": result.seconds["overhead"],
        }
        if result.peak_memory:
            taken["peak_memory_gib"] = result.peak_memory / 2**30
        self._tracker.metrics(self.run_id, taken, 0)
        if result.content_hash:
            self._tracker.params(self.run_id, {HASH_PARAM: result.content_hash})
            self._tracker.artifact(self.run_id, result.folder, "adapter")
        self.end("finished" if result.finished else "stopped")

    def end(self, status: RunStatus) -> None:
        """End the run with a status."""
        self._tracker.finish(self.run_id, status)


class LaneReporter(Reporter):
    """Passes a run's numbers on to the broker and the tracker, and asks for the search's decisions."""

    def __init__(self, lane: Lane, request: TrainRequest, tracked: _TrackedRun | None) -> None:
        self._lane, self._tracked = lane, tracked
        self._key, self._steps = request.key, request.run.optim.steps
        self._must_end = False
        self._asked = 0.0
        self.waited = 0.0
        """Seconds that the run waited for decisions."""

    @property
    def interrupted(self) -> bool:
        """Whether the sweep was interrupted."""
        return self._must_end or self._lane.interrupted

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass the numbers of a step on without waiting."""
        shown = {name: metrics[name] for name in ("train_loss", "tokens_per_second")}
        progress = {"step": step, "steps": self._steps, **shown}
        self._lane.broker.log.remote(self._key, progress)
        if self._tracked:
            self._tracked.metrics(metrics, step)

    def report(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Pass an evaluation on and wait for the search's decision."""
        verdict = self.ask(step, metrics)
        return True if verdict is None else self.decided(ray.get(verdict))

    def ask(self, step: int, metrics: Mapping[str, float]) -> Any:
        """Pass an evaluation on; return a reference to the search's decision, or None if there is none."""
        if self._tracked:
            self._tracked.metrics(metrics, step)
        if not self.must_ask(step):
            # There is nothing to decide after the last step; the result carries the number.
            self._lane.broker.log.remote(self._key, {"step": step, **metrics})
            return None
        self._asked = time.perf_counter()
        return self._lane.broker.report.remote(self._key, step, dict(metrics))

    def must_ask(self, step: int) -> bool:
        """Return whether the search has to decide on an evaluation: not after the last step."""
        return step < self._steps

    def decided(self, verdict: Verdict) -> bool:
        """Receive the decision; return whether the run goes on."""
        self.waited += time.perf_counter() - self._asked
        self._must_end = verdict == "interrupt"
        return verdict != "stop"

    def note(self, text: str) -> None:
        """Pass a sentence on to the person who watches the sweep."""
        self._lane.broker.note.remote(f"{self._key}: {text}")

"""The jobs of a lane that share its batches: trials that take their steps together, and scores.

A trial that ends gives its slot to the next one in the broker's queue. A trial that waits for the search's
decision takes no part in a step, and the others go on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ray

from rayft.artifacts import AdapterArtifact
from rayft.errors import RayftError
from rayft.models.inject import check_fits
from rayft.peft.folder import Artifact, PeftFolder, load_adapter
from rayft.sweep.jobs import Job
from rayft.sweep.request import TrainRequest
from rayft.sweep.result import TrialResult
from rayft.sweep.score import ScoreRequest, questions, room, score_together
from rayft.sweep.trial import TrialCourse
from rayft.train.course import CrowdedError
from rayft.train.packed import Courses, Pack
from rayft.train.session import Session
from rayft.train.slots import Sizing

if TYPE_CHECKING:
    from rayft.sweep.lane import Lane

__all__ = ["PackedScores", "PackedTrials"]

SETTLE_SECONDS = 0.5
"""How long a lane waits for the decisions on new evaluations before the other trials go on without them."""


class PackedTrials:
    """Trials that share a lane's steps.

    Args:
        lane: where they train.
        session: base and data.
        first: the first of them; the others must have the same `Job.pack`.
        size: how they share steps.
    """

    def __init__(self, lane: Lane, session: Session, first: Job[Any, Any], size: Sizing) -> None:
        self._lane, self._first, self._slots = lane, first, size.slots
        self._pack = Pack(session, lane.note, graphs=size.graphs)
        self._courses = Courses[TrialResult | None](self._pack)
        self._jobs: dict[str, Job[Any, Any]] = {}
        self._trials: dict[str, TrialCourse] = {}
        self._verdicts: dict[str, Any] = {}
        """Trial → reference to the search's decision."""
        self._stepped = False
        """Whether the present slots have taken a step; the first one builds, compiles and captures."""
        self._new = False
        """Whether some of them have just been asked for."""

    def run(self) -> None:
        """Train until no trial is left; each is told to the broker as it ends."""
        with self._pack.stream():
            try:
                self._begin(self._first)
                while self._fill() or len(self._courses):
                    self._ask()
                    self._hear()
                    with self._lane.timed("train" if self._stepped else "first steps of new slots"):
                        self._courses.advance()
                    self._stepped = True
                    self._end()
            finally:
                self._courses.close()
                self._pack.close()

    def _fill(self) -> bool:
        """Start waiting trials in free slots; return whether there was one."""
        begun = False
        while len(self._courses) < self._slots:
            job = ray.get(self._lane.broker.pull.remote(self._lane.name, 0.0, self._first.pack))
            if not isinstance(job, Job):
                break
            self._begin(job)
            begun = True
        return begun

    def _begin(self, job: Job[Any, Any]) -> None:
        request: TrainRequest = job.request
        started = time.perf_counter()
        try:
            with self._lane.timed("train"):
                trial = TrialCourse(request, self._lane, self._pack.session(), started, self._pack)
        except Exception as error:  # noqa: BLE001  (reported to the broker; it ends the job and not the lane)
            self._lane.ended(job, error)
            return
        self._jobs[job.id], self._trials[job.id] = job, trial
        self._stepped = False
        with self._lane.timed("train"):
            self._courses.begin(job.id, trial.course(), trial.clock)
        self._end()

    def _ask(self) -> None:
        """Pass on new evaluations, all in one message."""
        new = {k: q for k, q in self._courses.questions.items() if k not in self._verdicts}
        due = [
            (key, asked.step, dict(asked.metrics))
            for key, asked in new.items()
            if self._trials[key].reporter.must_ask(asked.step)
        ]
        if due:
            self._lane.broker.announce.remote(due)
        for key, asked in new.items():
            try:
                verdict = self._trials[key].reporter.ask(asked.step, asked.metrics)
            except Exception as error:  # noqa: BLE001  (the tracker's; it must not end the others)
                self._courses.fail(key, error)
                continue
            if verdict is None:
                self._answer(key, go_on=True)
            else:
                self._verdicts[key], self._new = verdict, True

    def _hear(self) -> None:
        """Receive the decisions that have been made; wait for one if no trial can go on without."""
        if not self._verdicts:
            return
        references = {reference: key for key, reference in self._verdicts.items()}
        idle = len(self._verdicts) == len(self._courses)
        patience, self._new = SETTLE_SECONDS if self._new else 0.0, False
        with self._lane.timed("wait for decisions"):
            ready, _ = ray.wait([*references], num_returns=len(references), timeout=patience)
            if idle and not ready:
                ready, _ = ray.wait([*references], num_returns=1)
        for reference in ready:
            key = references[reference]
            del self._verdicts[key]
            self._answer(key, go_on=self._trials[key].reporter.decided(ray.get(reference)))

    def _answer(self, key: str, *, go_on: bool) -> None:
        """Let a trial go on, or end, after an evaluation."""
        with self._lane.timed("train"):
            self._courses.answer(key, go_on)

    def _end(self) -> None:
        """Report the trials that have ended to the broker."""
        ended = self._courses.ended()
        if crowded := [key for key, result in ended.items() if isinstance(result, CrowdedError)]:
            self._slots = max(1, len(self._courses))
            self._lane.note(
                f"{', '.join(crowded)}: no room in the device's memory beside the other trials of "
                f"{self._lane.name}, which now trains {self._slots} at a time; these go on later"
            )
        for key, result in ended.items():
            self._stepped = False
            job = self._jobs.pop(key)
            del self._trials[key]
            self._lane.ended(job, result)


class PackedScores:
    """Adapters, and the base, that are scored in the same batches.

    Args:
        lane: where they are scored.
        session: base and data.
        first: the first of them; the others must have the same `Job.pack`.
    """

    def __init__(self, lane: Lane, session: Session, first: Job[Any, Any]) -> None:
        self._lane, self._session, self._first = lane, session, first

    def run(self) -> None:
        """Score the jobs that fill a batch together; each is reported to the broker."""
        together: dict[str, Job[Any, Any]] = {}
        adapters: dict[str, AdapterArtifact | None] = {}
        for key, job in self._jobs().items():
            try:
                adapter = self._adapter(job.request)
            except RayftError as error:
                self._lane.ended(job, error)
                continue
            if isinstance(adapter, PeftFolder):
                # PEFT's layers know one batch.
                self._lane.run_alone(job)
            else:
                together[key], adapters[key] = job, adapter
        if not together:
            return
        requests = {key: job.request for key, job in together.items()}
        total = sum(questions(request, self._session) for request in requests.values())
        progress = _Progress(self._lane, [*together], total)
        try:
            found = score_together(requests, adapters, self._session, self._lane.note, progress.add)
        except Exception:  # noqa: BLE001  (each then fails, or not, for a reason of its own)
            for job in together.values():
                self._lane.run_alone(job)
            return
        for key, job in together.items():
            self._lane.ended(job, found[key])

    def _jobs(self) -> dict[str, Job[Any, Any]]:
        """Take jobs until their questions fill a batch."""
        jobs = {self._first.id: self._first}
        request = self._first.request
        count = questions(request, self._session)
        most = room(self._session, request.run.evaluate.batch_size)
        while count < most:
            job = ray.get(self._lane.broker.pull.remote(self._lane.name, 0.0, self._first.pack))
            if not isinstance(job, Job):
                break
            jobs[job.id] = job
            count += questions(job.request, self._session)
        return jobs

    def _adapter(self, request: ScoreRequest) -> Artifact | None:
        """Read the adapter of a request, and check that it fits; None for the base."""
        if request.adapter is None:
            return None
        found = load_adapter(self._session.home.local(request.adapter))
        check_fits(self._session.loaded.model, found)
        return found


class _Progress:
    """Shows how far jobs are that are done together."""

    def __init__(self, lane: Lane, jobs: list[str], total: int) -> None:
        self._lane, self._jobs, self._total, self._done = lane, jobs, total, 0

    def add(self, count: int) -> None:
        """Count some more questions."""
        self._done += count
        for job in self._jobs:
            self._lane.progress(self._done, self._total, job)

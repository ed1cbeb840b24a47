"""A lane: a Ray Train worker group that keeps a base in memory and does one job after the other.

Between two trials only the adapters and the DeepSpeed engine are made anew, in the same process group;
starting a worker group instead takes 15 to 40 s. An isolated trial runs in a lane of its own that does one
job.
"""

from __future__ import annotations

import gc
import json
import logging
import pickle
import secrets
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil
import ray
import ray.exceptions
import torch
from ray.train.torch import get_device

from rayft.errors import InterruptedRunError, RayftError, TrainError
from rayft.files import disk_full, disk_full_error
from rayft.identity import Identity
from rayft.models.files import cache_folder
from rayft.models.packed import unpackable
from rayft.sweep.broker import CLOSE, Beat
from rayft.sweep.jobs import Job, NewGroupError
from rayft.sweep.packed import PackedScores, PackedTrials
from rayft.sweep.rehearsal import end_rehearsal
from rayft.sweep.request import TrainRequest
from rayft.sweep.result import TrialResult
from rayft.sweep.score import ScoreRequest
from rayft.sweep.settings import LaneSettings
from rayft.sweep.transfer import find_home
from rayft.tracking.base import TrackerSpec
from rayft.tracking.mlflow import MlflowTracker
from rayft.train.course import CrowdedError
from rayft.train.home import Home
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.slots import Sizing, sizing
from rayft.train.worker import Worker

__all__ = ["Lane", "serve_jobs"]

BEAT_SECONDS = 1.0
"""Time between two signs of life of a worker."""
logger = logging.getLogger(__name__)


def serve_jobs(settings: LaneSettings) -> None:
    """Pull jobs and do them until the broker closes; every worker of the group runs this."""
    _quiet_libraries()
    lane = Lane(settings)
    try:
        while True:
            job = lane.next_job()
            if job == CLOSE:
                return
            if isinstance(job, Job):
                lane.run(job)
            elif settings.once:
                return
    finally:
        lane.close()


class Lane:
    """One worker's side of a lane, which requests use: the session, the home, the trackers, the broker."""

    def __init__(self, settings: LaneSettings) -> None:
        self.name, self.broker = settings.name, settings.broker
        self._wait = 0.0 if settings.once else 20.0
        self._slots = settings.slots
        self._alone = False
        """Whether trials were found to take turns."""
        device = get_device()
        if device.type == "cuda":
            # NCCL moves objects through the current device, which must be this worker's own.
            torch.cuda.set_device(device)
        self.worker = Worker.current(str(device))
        self._session: Session | None = None
        start = self.worker.agreed(f"{settings.name}-{secrets.token_hex(4)}")
        self.home = find_home(settings.home, start)
        self._heart = _Heart(settings, self.worker.rank, self.home, self._ticks)
        self._opened = ""
        self._jobs = self._sessions = 0
        self._trackers: dict[TrackerSpec, MlflowTracker] = {}

    @property
    def interrupted(self) -> bool:
        """Whether the sweep was interrupted."""
        return self._heart.interrupted

    @property
    def loaded(self) -> bool:
        """Whether a base is in memory."""
        return self._session is not None

    def next_job(self) -> Job[Any, Any] | str | None:
        """Pull on rank 0 and pass the job on to all workers."""
        job = None
        if self.worker.rank == 0:
            job = ray.get(self.broker.pull.remote(self.name, self._wait))
        return self.worker.agreed(job)  # type: ignore[no-any-return]

    def run(self, job: Job[Any, Any]) -> None:
        """Do a job; an error that a user can fix ends the job, not the lane.

        In a group, an error ends the workers too unless all of them raise it, since the others may wait for
        this one. A new group then takes the next job.
        """
        self._jobs += 1
        scope = f"job{self._jobs}"
        with self.home.within(scope):
            if self._packs(job):
                self._run_packed(job)
            else:
                self.run_alone(job)
        self.home.drop(scope)

    def run_alone(self, job: Job[Any, Any]) -> None:
        """Do a job that shares no batches with others."""
        self._job, request = job.id, job.request
        try:
            with self.timed(job.kind):
                result = request(self)
        except Exception as error:  # noqa: BLE001  (told to the broker)
            result = error
        self.ended(job, result)

    def _packs(self, job: Job[Any, Any]) -> bool:
        """Return whether a job may share the lane's batches with others."""
        trial = job.kind == TrainRequest.kind
        return bool(job.pack) and self._slots != 1 and not (trial and self._alone)

    def _run_packed(self, first: Job[Any, Any]) -> None:
        """Do a job, and others that share its batches as long as there are any."""
        request = first.request
        try:
            session = self.session(request.run, request.expected)
        except Exception as error:  # noqa: BLE001  (told to the broker)
            self.ended(first, error)
            return
        if isinstance(request, ScoreRequest):
            if request.run.model.quantize is not None:
                self.run_alone(first)
                return
            with self.timed(first.kind):
                PackedScores(self, session, first).run()
        elif (size := self._size(request.run, session)).slots > 1:
            PackedTrials(self, session, first, size).run()
        else:
            self.run_alone(first)

    def _size(self, run: RunConfig, session: Session) -> Sizing:
        """Return how trials like a run share steps; if they do not, no further ones are tried."""
        reason, size = unpackable(session.loaded.model), Sizing()
        end_rehearsal()
        if not reason:
            with self.timed("find the number of slots"):
                size = sizing(run, session, self._slots)
            reason = "a step of one keeps the device busy" if size.slots == 1 else ""
        if reason:
            self.note(f"trials take turns on {self.name}, because {reason}")
            self._alone = True
        return size

    def session(self, run: RunConfig, expected: Identity, *, whole: bool = False) -> Session:
        """Return the session of a run's base and data; it stays in memory as long as jobs ask for the same.

        Args:
            run: names the base and the data.
            expected: their identity, as the driver has read them; empty fields are not compared.
            whole: whether each worker needs the whole base, as in `Session.open`.

        Raises:
            TrainError: on all workers, if they are not what the driver has read.
        """
        # Only then do the two ways of loading differ.
        whole = whole and run.scale.zero == 3 and self.worker.world > 1
        wanted = {"model", "data", "scale", "evaluate"}
        key = json.dumps([run.model_dump(mode="json", include=wanted), whole], sort_keys=True)
        if self._session is None or self._opened != key:
            self.forget()
            self._session = self._open(run, identify_base=bool(expected.base), whole=whole)
            self._opened = key
        changed = expected.differences(self._session.identity)
        if self.worker.largest(len(changed)):
            error = TrainError(
                f"since the command began {'; '.join(changed) or 'what another worker reads has changed'}. "
                "Leave data and base alone while it runs, let all machines read the same, and run it again"
            )
            error.everywhere = True
            raise error
        return self._session

    def note(self, text: str) -> None:
        """Show a sentence to the person who watches the command."""
        ray.get(self.broker.note.remote(text))

    def progress(self, done: int, total: int, job: str = "") -> None:
        """Show how far a job is, by default the current one: the examples that are done, and all of them."""
        if self.worker.rank == 0:
            self.broker.log.remote(job or self._job, {"step": done, "steps": total})

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the seconds of the block among those that lanes spend on something."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.worker.rank == 0:
                self.broker.spend.remote(what, time.perf_counter() - started)

    def forget(self) -> None:
        """Free the base, including the reference cycles that it is part of."""
        if self._session is not None:
            self._session = None
            gc.unfreeze()
            gc.collect()
            self.home.drop(f"session{self._sessions}")

    def tracker(self, spec: TrackerSpec) -> MlflowTracker:
        """Return the tracker of a specification, which the lane keeps."""
        if spec not in self._trackers:
            self._trackers[spec] = MlflowTracker(spec)
        return self._trackers[spec]

    def close(self) -> None:
        """Stop the signs of life, and delete what this lane has copied and written beside the home's disk."""
        self._heart.stop()
        for tracker in self._trackers.values() if not self.home.seen else ():
            # The tracker reads the adapters that it sends, so it must be done before they are deleted.
            tracker.close()
        self.home.close()

    def ended(self, job: Job[Any, Any], result: object) -> None:
        """Report to the broker how a job has ended: with a result, or with an exception.

        Raises:
            Exception: what was raised, if only a new worker group can go on.
        """
        if isinstance(result, InterruptedRunError):
            if self.worker.rank == 0:
                ray.get(self.broker.pause.remote(job.id, result.step))
        elif isinstance(result, CrowdedError):
            ray.get(self.broker.put_back.remote(job.id))
        elif isinstance(result, NewGroupError):
            self._end_group(job, str(result), pickle.dumps(result.request))
        elif isinstance(result, Exception):
            self._failed(job, result)
        elif self.worker.rank == 0:
            last = (
                (result.result.steps, {"val_loss": result.result.val_loss})
                if isinstance(result, TrialResult)
                else ()
            )
            ray.get(self.broker.finish.remote(job.id, pickle.dumps(result), *last))

    def _failed(self, job: Job[Any, Any], error: Exception) -> None:
        """Handle the error of a job; raise it, or another one, if the group has to end."""
        if disk_full(error):
            # Any worker reports it: the others may wait for this one until the end of the sweep ends them.
            folders = *job.request.folders, Path(tempfile.gettempdir()), cache_folder()
            full = disk_full_error(error, *folders)
            ray.get(self.broker.fail.remote(job.id, str(full), fatal=True))
        elif isinstance(error, RayftError) and (error.everywhere or self.worker.world == 1):
            self._fail(job, str(error))
        elif isinstance(error, RayftError):
            self._end_group(job, str(error))
        elif self.worker.world > 1:
            # The workers may have failed at different places: only a new group brings them in step again.
            raise error
        else:
            logger.error("job %s failed", job.id, exc_info=error)
            trace = "".join(traceback.format_exception(error, limit=-4))
            self._fail(job, f"{type(error).__name__}: {error}\n{trace}")

    def _open(self, run: RunConfig, *, identify_base: bool, whole: bool) -> Session:
        if self.worker.rank == 0:
            logger.info("loading %s", run.model.name)
        torch.set_num_threads(run.scale.threads or 1)
        self._sessions += 1
        with self.home.within(f"session{self._sessions}"), self.timed("load the base"):
            session = Session.open(run, self.worker, self.home, identify_base=identify_base, whole=whole)
        # Each trial ends with a search for reference cycles, which need not visit all modules and the base.
        gc.collect()
        gc.freeze()
        return session

    def _ticks(self) -> int:
        session = self._session
        return session.ticks if session else 0

    def _end_group(self, job: Job[Any, Any], reason: str, payload: bytes | None = None) -> NoReturn:
        """End this worker, and thereby the group, so that a new one is started.

        Args:
            job: the job.
            reason: why it ends.
            payload: the request that the new group does in place of the job's; None if the job has failed.
        """
        ray.get(self.broker.renew.remote(self.name, job.id, payload, reason))
        # Not the error itself, whose modules the launcher would have to import.
        raise RuntimeError(reason) from None

    def _fail(self, job: Job[Any, Any], message: str) -> None:
        if self.worker.rank == 0:
            ray.get(self.broker.fail.remote(job.id, message))


class _Heart:
    """A thread that sends the broker signs of life and receives whether the sweep was interrupted.

    Args:
        settings: the lane's.
        rank: this worker's.
        home: marked as in use with each sign of life.
        ticks: returns the number of batches that this worker has computed.
    """

    def __init__(self, settings: LaneSettings, rank: int, home: Home, ticks: Callable[[], int]) -> None:
        self._settings, self._rank, self._home, self._ticks = settings, rank, home, ticks
        self._process = psutil.Process()
        self._node = ray.get_runtime_context().get_node_id()
        self.interrupted = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rayft-heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send no more signs of life, and wait until the thread has ended."""
        self._stopped.set()
        self._thread.join(5 * BEAT_SECONDS)

    def _run(self) -> None:
        broker, lane = self._settings.broker, self._settings.name
        while not self._stopped.is_set():
            self._home.alive()
            beat = Beat(
                rank=self._rank,
                ticks=self._ticks(),
                memory=self._process.memory_info().rss,
                pid=self._process.pid,
                node=self._node,
            )
            try:
                self.interrupted = bool(ray.get(broker.beat.remote(lane, beat)))
            except ray.exceptions.ActorUnavailableError:
                # Only for a moment; the broker receives the next beat.
                pass
            except ray.exceptions.RayError:
                # The sweep is over, or its cluster shuts down; the lane notices it at its next call.
                return
            self._stopped.wait(BEAT_SECONDS)


def _quiet_libraries() -> None:
    """Hide messages from the user's terminal that are meant for developers of the libraries."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("DeepSpeed", "mlflow", "alembic", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)

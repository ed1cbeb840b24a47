"""A lane: a Ray Train worker group that keeps a base in memory and takes one job after the other.

Between two trials only the adapters and the DeepSpeed engine are made anew, in the same process
group; starting a worker group instead costs 15 to 40 s. An isolated trial is a lane of its own that
takes one job. Its workers run `work`.
"""

from __future__ import annotations

import gc
import json
import logging
import secrets
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray
import ray.exceptions
import torch
from ray.train.torch import get_device

from rayft.config import leaves
from rayft.errors import DiskFullError, InterruptedRunError, RayftError, TrainError
from rayft.files import disk_full, disk_full_error
from rayft.identity import UNKNOWN, Identity
from rayft.models.files import cache_folder
from rayft.models.methods import method
from rayft.sweep.broker import CLOSE, Beat, Job, Verdict
from rayft.sweep.launcher import LaneSettings
from rayft.sweep.result import file_hashes, write_result
from rayft.sweep.transfer import find_home
from rayft.tracking.base import Former, TrackerSpec
from rayft.tracking.mlflow import MlflowTracker
from rayft.tracking.runs import HASH_PARAM
from rayft.train.context import Reporter, Session, Worker, trial_folder
from rayft.train.home import Home
from rayft.train.run import RunConfig
from rayft.train.trainer import Trainer, TrainResult

__all__ = ["TrainRequest", "Work", "tracking_key", "work"]

BEAT_SECONDS = 1.0
"""Between two signs of life of a worker."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainRequest:
    """A trial, as a lane gets it."""

    key: str
    name: str
    run: str
    """The `RunConfig` as JSON."""
    output: str
    evaluate_at: tuple[int, ...]
    tracker: TrackerSpec | None = None
    parent: str | None = None
    """Tracking run that the trial's run is a child of."""
    expected: Identity = UNKNOWN
    """Data and base, as the driver has read them."""

    @property
    def identity(self) -> Identity:
        """What the result will follow from."""
        run = RunConfig.model_validate_json(self.run)
        return self.expected.model_copy(update={"config": run.hash})


class Work(Protocol):
    """What a lane does with the base and the data beside training; pickled, so of an importable module."""

    @property
    def run(self) -> str:
        """Give the `RunConfig` as JSON: which base and which data."""

    @property
    def expected(self) -> Identity:
        """Return the identity of both, as the driver has read them; empty fields are not compared."""

    def __call__(self, session: Session, run: RunConfig) -> dict[str, Any]:
        """Do it (all workers call it), and give what the client is to get, the first worker's."""


class _Heart:
    """A thread that tells the broker that this worker lives, and hears whether its trial is interrupted."""

    def __init__(
        self, settings: LaneSettings, rank: int, home: Home, session: Callable[[], Session | None]
    ) -> None:
        self._settings, self._rank, self._home, self._session = settings, rank, home, session
        self._process = psutil.Process()
        self._node = ray.get_runtime_context().get_node_id()
        self.interrupted = False
        threading.Thread(target=self._run, name="rayft-heart", daemon=True).start()

    def _run(self) -> None:
        broker, lane = self._settings.broker, self._settings.name
        while True:
            session = self._session()
            self._home.alive()
            beat = Beat(
                rank=self._rank,
                ticks=session.ticks if session else 0,
                memory=self._process.memory_info().rss,
                pid=self._process.pid,
                node=self._node,
            )
            try:
                self.interrupted = bool(ray.get(broker.beat.remote(lane, beat)))
            except ray.exceptions.ActorUnavailableError:
                # For a moment; the broker hears the next one.
                pass
            except ray.exceptions.RayError:
                # The sweep is over, or its cluster is going down; the lane hears it at its next call.
                return
            time.sleep(BEAT_SECONDS)


class _LaneReporter(Reporter):
    """Tells the broker and the tracker; waits for the broker's verdict."""

    def __init__(
        self, broker: Any, key: str, steps: int, tracker: MlflowTracker | None, run_id: str, heart: _Heart
    ) -> None:
        self._broker, self._key, self._steps = broker, key, steps
        self._tracker, self._run_id = tracker, run_id
        self._heart = heart
        self._told = False
        self.waited = 0.0

    @property
    def interrupted(self) -> bool:
        """Return whether the sweep was interrupted."""
        return self._told or self._heart.interrupted

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass a step's numbers on without waiting."""
        progress = {"step": step, "steps": self._steps, "train_loss": metrics["train_loss"]}
        self._broker.log.remote(self._key, progress)
        if self._tracker:
            self._tracker.metrics(self._run_id, metrics, step)

    def report(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Pass an evaluation on and wait for the search's decision."""
        if self._tracker:
            self._tracker.metrics(self._run_id, metrics, step)
        if step >= self._steps:
            # Nothing is left to decide; the result that follows carries the number.
            self._broker.log.remote(self._key, {"step": step, **metrics})
            return True
        started = time.perf_counter()
        verdict: Verdict = ray.get(self._broker.report.remote(self._key, step, dict(metrics)))
        self.waited += time.perf_counter() - started
        self._told = verdict == "interrupt"
        return verdict != "stop"

    def note(self, text: str) -> None:
        """Pass a sentence on to the person who watches."""
        self._broker.tell.remote(f"{self._key}: {text}")


def work(settings: LaneSettings) -> None:
    """Pull jobs until the broker closes; every worker of the group runs this."""
    _quiet_libraries()
    lane = _Lane(settings)
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


class _Lane:
    """One worker's side of a lane: its session, and the tracker of rank 0."""

    def __init__(self, settings: LaneSettings) -> None:
        self._broker = settings.broker
        self._name = settings.name
        self._wait = 0.0 if settings.once else 20.0
        device = get_device()
        if device.type == "cuda":
            # Objects travel over NCCL through the current device, which must be this worker's own.
            torch.cuda.set_device(device)
        self._worker = Worker.current(str(device))
        self._session: Session | None = None
        start = self._worker.agreed(f"{settings.name}-{secrets.token_hex(4)}")
        self._home = find_home(settings.home, start)
        self._heart = _Heart(settings, self._worker.rank, self._home, lambda: self._session)
        self._opened = ""
        self._jobs = self._sessions = 0
        self._trackers: dict[TrackerSpec, MlflowTracker] = {}

    def next_job(self) -> Job | str | None:
        """Pull on rank 0 and hand the job to all."""
        job = None
        if self._worker.rank == 0:
            job = ray.get(self._broker.pull.remote(self._name, self._wait))
        return self._worker.agreed(job)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Delete what this lane has copied and written beside the home's disk."""
        for tracker in self._trackers.values() if not self._home.seen else ():
            # It reads the adapters that it sends.
            tracker.close()
        self._home.close()

    def run(self, job: Job) -> None:
        """Do a job; what a user can mend ends the job, not the lane."""
        self._jobs += 1
        scope = f"job{self._jobs}"
        with self._home.within(scope):
            self._run(job)
        self._home.drop(scope)

    def _run(self, job: Job) -> None:
        started = time.perf_counter()
        try:
            step, values = self._train(job, started) if job.kind == "train" else (0, self._work(job))
        except InterruptedRunError as error:
            if self._worker.rank == 0:
                ray.get(self._broker.pause.remote(job.id, error.step))
        except Exception as error:
            if disk_full(error):
                # Whichever worker it is: the others may wait for it until the sweep's end ends them.
                ray.get(self._broker.fail.remote(job.id, str(self._full(job, error)), fatal=True))
                return
            if isinstance(error, RayftError):
                self._fail(job, str(error))
                return
            # Workers may have failed at different places: only a new group puts them in step again.
            if self._worker.world > 1:
                raise
            logger.exception("job %s failed", job.id)
            self._fail(job, f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}")
        else:
            if self._worker.rank == 0:
                ray.get(self._broker.finish.remote(job.id, step, values))

    def session(self, run: RunConfig, expected: Identity, *, whole: bool = False) -> Session:
        """Keep the base and the data in memory as long as they are the ones that are asked for.

        Args:
            run: names both.
            expected: their identity, as the driver has read them.
            whole: whether each worker needs the whole base, as `Session.open` takes it.

        Raises:
            TrainError: if they are not what the driver has read, on all workers alike.
        """
        wanted = {"model", "data", "scale", "evaluate"}
        key = json.dumps([run.model_dump(mode="json", include=wanted), whole], sort_keys=True)
        if self._session is None or self._opened != key:
            self._forget()
            if self._worker.rank == 0:
                logger.info("loading %s", run.model.name)
            self._sessions += 1
            torch.set_num_threads(run.scale.threads or 1)
            with self._home.within(f"session{self._sessions}"):
                self._session = Session.open(
                    run,
                    self._worker,
                    self._home,
                    identify_base=bool(expected.base),
                    whole=whole,
                )
            self._opened = key
            # Each trial ends with a search for cycles, which need not go through all modules and the base.
            gc.collect()
            gc.freeze()
        changed = expected.differences(self._session.identity)
        if self._worker.largest(len(changed)):
            raise TrainError(
                f"since the command began {'; '.join(changed) or 'what another worker reads has changed'}. "
                "Leave data and base alone while it runs, let all machines read the same, and run it again"
            )
        return self._session

    def _forget(self) -> None:
        """Free the base, in whatever cycles it may be."""
        if self._session is not None:
            self._session = None
            gc.unfreeze()
            gc.collect()
            self._home.drop(f"session{self._sessions}")

    def _train(self, job: Job, started: float) -> tuple[int, dict[str, Any]]:
        request = job.request
        run = RunConfig.model_validate_json(request.run)
        fresh = self._session is None
        session = self.session(run, request.expected)
        loaded = time.perf_counter()
        home_folder = trial_folder(request.output, request.key)
        folder = self._home.place(home_folder)
        with self._worker.together():
            if self._worker.rank == 0 and not method(run.method.name).saves_model:
                self._home.check(home_folder / "adapter")
        tracker, run_id = self._track(request, run)
        reporter = _LaneReporter(self._broker, job.id, run.optim.steps, tracker, run_id, self._heart)
        try:
            result = Trainer(run, session, reporter, folder, request.evaluate_at).fit()
        except RayftError as error:
            # On a full disk nothing can be recorded; the next start sets the run running again.
            if tracker and not disk_full(error):
                interrupted = isinstance(error, InterruptedRunError)
                tracker.finish(run_id, "interrupted" if interrupted else "failed")
            raise
        finally:
            if not method(run.method.name).shares_base:
                # What it left is no base for the next trial; loading that again takes seconds, a new
                # worker group half a minute.
                self._forget()
        if self._worker.rank > 0:
            return result.steps, {}
        identity = session.identity.brief.model_copy(update={"config": run.hash, "start": result.start})
        values: dict[str, Any] = {"result": asdict(result), "run_id": run_id}
        values["identity"] = identity.model_dump(mode="json", exclude_defaults=True)
        if method(run.method.name).saves_model:
            values["hashes"] = file_hashes(Path(result.folder))
        self._finish_tracking(tracker, run_id, result)
        # Where it is tracked, it may be sent to the tracking server later.
        self._home.send(Path(result.folder), keep=tracker is not None and bool(result.content_hash))
        values["result"]["folder"] = str(home_folder / Path(result.folder).name)
        write_result(folder, values, self._home)
        spent = result.seconds["total"] - result.seconds["overhead"]
        # All that the lane spent on the trial beyond its own steps and evaluations; loading the
        # base is the lane's own start, paid once.
        overhead = time.perf_counter() - (loaded if fresh else started) - spent
        values["result"]["seconds"] |= {"overhead": overhead, "waiting": reporter.waited}
        write_result(folder, values, self._home)
        # From which it is trained again if its adapter should be damaged.
        self._home.prune(folder / "checkpoint", 1)
        return result.steps, values

    def _work(self, job: Job) -> dict[str, Any]:
        work: Work = job.request
        run = RunConfig.model_validate_json(work.run)
        return work(self.session(run, work.expected, whole=True), run)

    def _track(self, request: TrainRequest, run: RunConfig) -> tuple[MlflowTracker | None, str]:
        if request.tracker is None or self._worker.rank > 0:
            return None, ""
        if request.tracker not in self._trackers:
            self._trackers[request.tracker] = MlflowTracker(request.tracker)
        tracker = self._trackers[request.tracker]
        tags = {
            "rayft.kind": "trial",
            "rayft.method": run.method.name,
            "rayft.rank": str(run.method.rank),
            "rayft.lane": self._name,
        }
        key = tracking_key(request.key, request.expected)
        former = Former(request.key) if request.parent else None
        run_id = tracker.run(request.name, key, parent=request.parent, tags=tags, former=former)
        tracker.params(run_id, leaves(run))
        return tracker, run_id

    def _finish_tracking(self, tracker: MlflowTracker | None, run_id: str, result: TrainResult) -> None:
        if tracker is None:
            return
        found = {
            "best_val_loss": min((value for _, value in result.val_curve), default=float("nan")),
            "trainable_parameters": result.trainable,
            "adapter_bytes": result.bytes,
        }
        tracker.metrics(run_id, found)
        # Of a run whose end is trained again, because its result was lost, what it took first stays.
        taken = {
            "peak_memory_gib": result.peak_memory / 2**30,
            "train_tokens_per_second": result.tokens_per_second,
            "train_seconds": result.seconds["train"],
            "overhead_seconds": result.seconds["overhead"],
        }
        tracker.metrics(run_id, taken, 0)
        if result.content_hash:
            tracker.params(run_id, {HASH_PARAM: result.content_hash})
            tracker.artifact(run_id, result.folder, "adapter")
        tracker.finish(run_id, "finished" if result.finished else "stopped")

    def _fail(self, job: Job, message: str) -> None:
        if self._worker.rank == 0:
            ray.get(self._broker.fail.remote(job.id, message))

    def _full(self, job: Job, error: Exception) -> DiskFullError:
        """Return the error that names the full disk, also where no writer has told which one it is."""
        places = [Path(tempfile.gettempdir()), cache_folder()]
        if job.kind == "train":
            places.insert(0, Path(job.request.output))
        return disk_full_error(error, *places)


def _quiet_libraries() -> None:
    """Keep advice meant for developers of the libraries out of a user's terminal."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("DeepSpeed", "mlflow", "alembic", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def tracking_key(key: str, identity: Identity) -> str:
    """Return the key of a tracked run, which differs with the sweep, the data and the base."""
    suffix = identity.sweep or (identity.inputs if identity.data else "")
    return f"{key}-{suffix}" if suffix else key

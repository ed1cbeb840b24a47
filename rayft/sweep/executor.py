"""Executors run jobs in lanes that live as long as the sweep, or in a worker group for each trial.

Both pass jobs through a broker and run the same worker (`rayft.sweep.lane`); they differ in how long a worker
group lives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.sweep.broker import Broker, Patience
from rayft.sweep.entrance import Entrance
from rayft.sweep.jobs import Event, Job, Outcome
from rayft.sweep.launcher import Launcher
from rayft.sweep.settings import Group, HomeNode
from rayft.train.run import ScaleConfig

__all__ = ["EXECUTORS", "MOST_SLOTS", "Executor", "IsolatedExecutor", "LaneExecutor"]


MOST_SLOTS = 16
"""The most slots of a lane that finds out how many are fastest."""
WAITING = 2**20
"""Number of calls that the broker may have at the same time: one waits for each job, and one for each lane.
With Ray's default of 1000, no lane could report that it has done one of more jobs than that."""
LAUNCHING = 4
"""Number of calls that the launcher runs at the same time. One of them, `stay`, never returns."""
ResultT = TypeVar("ResultT")


class Executor(ABC):
    """Start worker groups for jobs; jobs and their events pass through `broker`.

    Args:
        scale: of each trial.
        storage: folder for Ray's files.
        lanes: number of trials that run at the same time.
        restarts: how often a job is tried again if its worker group dies.
        name: prefix of the lanes' names.
        patience: how long a lane may send no sign of life.
        slots: the most trials that share a lane's steps; None if lanes find out how many are fastest.

    Attributes:
        entrance: submits jobs from other processes.
        isolated: whether each submission gets a worker group of its own.
    """

    isolated = False

    def __init__(
        self,
        scale: ScaleConfig,
        storage: str,
        lanes: int,
        restarts: int,
        name: str,
        patience: Patience | None = None,
        slots: int | None = 1,
    ) -> None:
        self.slots = slots
        self.scale, self.storage, self.lanes, self.restarts, self.name = scale, storage, lanes, restarts, name
        group = Group(scale.workers, scale.device == "cuda", worker_resources(scale), storage)
        # On the driver's node, without which the sweep ends anyway: the loss of another node must not end it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        pinned: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
        broker = ray.remote(Broker).options(**pinned, max_concurrency=WAITING)
        self.broker: Any = broker.remote(restarts + 1, patience)
        self._launcher: Any = ray.remote(Launcher).options(**pinned, max_concurrency=LAUNCHING).remote(group)
        Path(storage).mkdir(parents=True, exist_ok=True)
        self._mark = Path(storage) / f"home-{uuid4().hex}"
        self._mark.touch()
        home = HomeNode(ray.get_runtime_context().get_node_id(), str(self._mark), self._launcher)
        self.entrance = Entrance(self.broker, home, name, slots, self.isolated)
        self.broker.depend_on.remote(self._launcher)  # type: ignore[attr-defined]

    def at_once(self, *, packs: bool) -> int:
        """Return the most trials that can be in progress at the same time.

        Args:
            packs: whether some of them can share a lane's steps.
        """
        slots = MOST_SLOTS if self.slots is None else self.slots
        return self.lanes * (slots if packs else 1)

    @abstractmethod
    def start(self) -> None:
        """Start the lanes that live as long as the executor, unless they have been started."""

    def submit(self, jobs: Sequence[Job[Any, Any]]) -> None:
        """Queue jobs, the first of which start the lanes; the broker has their events."""
        if jobs:
            self.start()
            self.entrance.submit(jobs)

    def forget(self, ids: Sequence[str]) -> None:
        """Forget jobs that have ended, so that they can be done again by any client."""
        ray.get(self.broker.forget.remote(ids))

    def run(self, jobs: Sequence[Job[Any, ResultT]]) -> Iterator[tuple[str, Outcome[ResultT]]]:
        """Submit jobs, and yield each job's id and outcome in the order in which the jobs end.

        Reports in between are answered with "continue".

        Raises:
            DiskFullError, ResourceError: if no job can succeed any more.
        """
        self.submit(jobs)
        waiting = {self.broker.next_event.remote(job.id): job for job in jobs}
        while waiting:
            (ready,), _ = ray.wait([*waiting], num_returns=1)
            job = waiting.pop(ready)
            event: Event = ray.get(ready)
            if event.kind == "report":
                waiting[self.broker.next_event.remote(job.id)] = job
            else:
                yield job.id, job.outcome(event)

    def interrupt(
        self, timeout: float = 120.0, meanwhile: Callable[[Sequence[str]], None] = lambda _: None
    ) -> tuple[list[str], list[str]]:
        """End all jobs; trials that are training write a checkpoint first.

        Args:
            timeout: seconds to wait for the checkpoints.
            meanwhile: called with the ids of the trials that are training, before the wait.

        Returns:
            The ids of the trials that have written one, and of those that have not in time.
        """
        training: list[str] = []
        late: list[str] = []
        with suppress(ray.exceptions.RayError):
            late = training = ray.get(self.broker.interrupt.remote(), timeout=timeout)
            meanwhile(training)
            late = ray.get(self.broker.settled.remote(timeout), timeout=2 * timeout)
        return [one for one in training if one not in late], late

    def close(self, timeout: float = 30.0) -> None:
        """End all worker groups, and wait until their devices and memory are free."""
        # One of the two actors may have died; lanes whose broker is gone end by themselves.
        with suppress(ray.exceptions.RayError):
            # Otherwise the broker could end itself because the launcher ends, and Ray would print a warning.
            ray.get(self.broker.close.remote(last=True))
        with suppress(ray.exceptions.RayError):
            ray.get(self._launcher.close.remote(timeout))
        for actor in (self.broker, self._launcher):
            ray.kill(actor)
        self._mark.unlink(missing_ok=True)


class LaneExecutor(Executor):
    """Lanes that live as long as the sweep."""

    _started = False

    def start(self) -> None:
        """Start the lanes, unless they have been started."""
        if self._started:
            return
        self._started = True
        for number in range(self.lanes):
            self.entrance.start_lane(f"{self.name}-lane{number}", once=False)


class IsolatedExecutor(Executor):
    """A worker group for each trial that changes the base, or for jobs that are submitted together."""

    isolated = True

    def start(self) -> None:
        """Do nothing: no worker group lives longer than its jobs."""


EXECUTORS: dict[str, type[Executor]] = {"lane": LaneExecutor, "isolated": IsolatedExecutor}


def worker_resources(scale: ScaleConfig) -> dict[str, float]:
    """Return the resources that Ray reserves for a worker. One CPU does not limit its threads."""
    return {"CPU": 1, "GPU": scale.gpu_share} if scale.device == "cuda" else {"CPU": 1}

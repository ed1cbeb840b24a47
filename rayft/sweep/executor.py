"""Who runs trials: lanes that live as long as the sweep, or a worker group for each trial.

Both go through a broker and run the same worker (`rayft.sweep.lane`); they differ in how long a
worker group lives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.sweep.broker import Broker, Job, Patience
from rayft.sweep.launcher import Group, HomeNode, LaneSettings, Launcher
from rayft.train.run import ScaleConfig

__all__ = ["EXECUTORS", "Executor", "IsolatedExecutor", "LaneExecutor"]


LAUNCHING = 4
"""Calls that the launcher answers at the same time. One of them, `stay`, never returns."""


class Executor(ABC):
    """Starts worker groups for jobs; jobs and their events go through `broker`.

    Args:
        scale: of each trial.
        storage: folder for what Ray keeps.
        lanes: trials at once.
        restarts: how often a job is tried again whose worker group dies.
        name: begins the lanes' names.
        patience: how long a lane may be silent.
    """

    def __init__(
        self,
        scale: ScaleConfig,
        storage: str,
        lanes: int,
        restarts: int,
        name: str,
        patience: Patience | None = None,
    ) -> None:
        self.scale, self.storage, self.lanes, self.restarts, self.name = scale, storage, lanes, restarts, name
        group = Group(scale.workers, scale.device == "cuda", worker_resources(scale), storage)
        # On the driver's node, without which the sweep ends anyway: no other node may end it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        pinned: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
        self.broker: Any = ray.remote(Broker).options(**pinned).remote(restarts + 1, patience)
        self._launcher: Any = ray.remote(Launcher).options(**pinned, max_concurrency=LAUNCHING).remote(group)
        Path(storage).mkdir(parents=True, exist_ok=True)
        self._mark = Path(storage) / f"home-{uuid4().hex}"
        self._mark.touch()
        self._home = HomeNode(ray.get_runtime_context().get_node_id(), str(self._mark), self._launcher)
        self.broker.depend_on.remote(self._launcher)  # type: ignore[attr-defined]

    @abstractmethod
    def start(self) -> None:
        """Start what lives as long as the executor, if that is not started yet."""

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs; their events come from the broker."""

    def interrupt(
        self, timeout: float = 120.0, meanwhile: Callable[[Sequence[str]], None] = lambda _: None
    ) -> list[str]:
        """End all jobs; trials that are training write a checkpoint first.

        Args:
            timeout: seconds to wait for the checkpoints.
            meanwhile: called with the trials that are training before they are waited for.

        Returns:
            The trials that were training.
        """
        training: list[str] = []
        with suppress(ray.exceptions.RayError):
            training = ray.get(self.broker.interrupt.remote(), timeout=timeout)
            meanwhile(training)
            ray.get(self.broker.settled.remote(), timeout=timeout)
        return training

    def close(self, timeout: float = 30.0) -> None:
        """End all worker groups, and wait until their devices and memory are free."""
        # One of the two may be what has died; the lanes of a broker that is gone end by themselves.
        with suppress(ray.exceptions.RayError):
            ray.get(self.broker.close.remote())
        with suppress(ray.exceptions.RayError):
            ray.get(self._launcher.close.remote(timeout))
        # The broker first: without the launcher it would end by itself, as if something had gone wrong.
        for actor in (self.broker, self._launcher):
            ray.kill(actor)
        self._mark.unlink(missing_ok=True)

    def _start_lane(self, lane: str, *, once: bool) -> None:
        settings = LaneSettings(name=lane, broker=self.broker, home=self._home, once=once)
        ray.get(self.broker.expect.remote(lane))
        ray.get(self._launcher.start.remote(settings))


class LaneExecutor(Executor):
    """Lanes that live as long as the sweep."""

    _started = False

    def start(self) -> None:
        """Start the lanes, unless they have been started."""
        if self._started:
            return
        self._started = True
        for number in range(self.lanes):
            self._start_lane(f"{self.name}-lane{number}", once=False)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs for whichever lane is free; the first jobs start the lanes."""
        if not jobs:
            return
        self.start()
        ray.get([self.broker.submit.remote(job) for job in jobs])


class IsolatedExecutor(Executor):
    """A worker group for each trial, for what changes the base; one for what is scored together."""

    def start(self) -> None:
        """Nothing lives longer than a job."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs for a worker group that is started for them and ends after the last."""
        if not jobs:
            return
        lane = f"{self.name}-{jobs[0].id}"
        own = [Job(job.id, job.kind, job.payload, lane=lane) for job in jobs]
        ray.get([self.broker.submit.remote(job) for job in own])
        self._start_lane(lane, once=True)


EXECUTORS: dict[str, type[Executor]] = {"lane": LaneExecutor, "isolated": IsolatedExecutor}


def worker_resources(scale: ScaleConfig) -> dict[str, float]:
    """What Ray reserves for a worker: one CPU slot (threads are set apart from it) and its share of a GPU."""
    return {"CPU": 1, "GPU": scale.gpu_share} if scale.device == "cuda" else {"CPU": 1}

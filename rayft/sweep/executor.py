"""Who runs trials: lanes that live as long as the sweep, or a worker group for each trial.

Both go through a broker and run the same worker (`rayft.sweep.lane`); they differ in how long a
worker group lives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import ray

from rayft.sweep.broker import Broker, Job
from rayft.sweep.lane import LaneSettings, lane_worker
from rayft.train.run import ScaleConfig

__all__ = ["EXECUTORS", "Executor", "IsolatedExecutor", "LaneExecutor"]


class LaneHost:
    """An actor that holds one Ray Train run, a lane, until its workers end."""

    def run(self, settings: LaneSettings, scale: ScaleConfig, storage: str, restarts: int) -> None:
        """Start the worker group and wait; a group that dies is started again `restarts` times."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        cuda = scale.device == "cuda"
        trainer = TorchTrainer(
            # Ray hands any one object on; its annotations say a dict.
            lane_worker,  # type: ignore[arg-type]
            train_loop_config=settings,  # type: ignore[arg-type]
            scaling_config=ScalingConfig(
                num_workers=scale.workers, use_gpu=cuda, resources_per_worker=worker_resources(scale)
            ),
            torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
            run_config=RunConfig(
                name=settings.name, storage_path=storage, failure_config=FailureConfig(max_failures=restarts)
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  (whatever ended the group, the waiting jobs must hear it)
            message = f"lane {settings.name} ended: {type(error).__name__}: {error}"
            ray.get(settings.broker.lane_lost.remote(settings.name, message))


class Launcher:
    """An actor that starts hosts and owns them: trials come and go, the driver's launcher stays."""

    def __init__(self, scale: ScaleConfig, storage: str, restarts: int) -> None:
        self._scale, self._storage, self._restarts = scale, storage, restarts
        self._hosts: dict[Any, Any] = {}

    def start(self, settings: LaneSettings) -> None:
        """Start a lane's host; hosts that have ended are let go."""
        self._reap(timeout=0)
        host: Any = ray.remote(LaneHost).options(num_cpus=0).remote()
        self._hosts[host.run.remote(settings, self._scale, self._storage, self._restarts)] = host

    def close(self, timeout: float) -> None:
        """Wait for the hosts to end, and end those that don't."""
        self._reap(timeout)
        for host in self._hosts.values():
            ray.kill(host)
        self._hosts.clear()

    def _reap(self, timeout: float) -> None:
        runs = list(self._hosts)
        ended, _ = ray.wait(runs, num_returns=len(runs), timeout=timeout) if runs else ([], [])
        for run in ended:
            ray.kill(self._hosts.pop(run))


class Executor(ABC):
    """Starts worker groups for jobs; jobs and their events go through `broker`."""

    def __init__(self, scale: ScaleConfig, storage: str, lanes: int, restarts: int, name: str) -> None:
        self.scale, self.storage, self.lanes, self.restarts, self.name = scale, storage, lanes, restarts, name
        self.broker: Any = ray.remote(Broker).options(num_cpus=0).remote(restarts + 1)
        self._launcher: Any = ray.remote(Launcher).options(num_cpus=0).remote(scale, storage, restarts)

    @abstractmethod
    def start(self) -> None:
        """Start what lives as long as the executor."""

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs; their events come from the broker."""

    def close(self, timeout: float = 30.0) -> None:
        """End all worker groups, and wait until their devices and memory are free."""
        ray.get(self.broker.close.remote())
        ray.get(self._launcher.close.remote(timeout))

    def _host(self, lane: str, *, once: bool) -> None:
        settings = LaneSettings(name=lane, broker=self.broker, once=once)
        ray.get(self._launcher.start.remote(settings))


class LaneExecutor(Executor):
    """Lanes that live as long as the sweep."""

    def start(self) -> None:
        """Start the lanes."""
        for number in range(self.lanes):
            self._host(f"{self.name}-lane{number}", once=False)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs for whichever lane is free."""
        ray.get([self.broker.submit.remote(job) for job in jobs])


class IsolatedExecutor(Executor):
    """A worker group for each trial, for what changes the base; one for what is scored together."""

    def start(self) -> None:
        """Nothing lives longer than a job."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs for a worker group that is started for them and ends after the last."""
        lane = f"{self.name}-{jobs[0].id}"
        own = [Job(job.id, job.kind, job.payload, lane=lane) for job in jobs]
        ray.get([self.broker.submit.remote(job) for job in own])
        self._host(lane, once=True)


EXECUTORS: dict[str, type[Executor]] = {"lane": LaneExecutor, "isolated": IsolatedExecutor}


def worker_resources(scale: ScaleConfig) -> dict[str, float]:
    """What Ray reserves for a worker: one CPU slot (threads are set apart from it) and its share of a GPU."""
    return {"CPU": 1, "GPU": scale.gpu_share} if scale.device == "cuda" else {"CPU": 1}

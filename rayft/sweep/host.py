"""The processes between a sweep and its workers: one that starts lanes, and a host for each lane.

Each is a process that Ray starts when the one before it asks, so what they import adds up before a lane
takes its first job. Hence nothing of torch, DeepSpeed or MLflow is imported here: `lane_worker`, which Ray
hands through all of them, imports the lane where it runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rayft.files import disk_full, disk_full_error

__all__ = ["Group", "LaneHost", "LaneSettings", "Launcher", "lane_worker"]


@dataclass(frozen=True)
class LaneSettings:
    """What a lane's workers are told when they start."""

    name: str
    broker: Any
    """Handle of the broker actor."""
    once: bool = False
    """End when no job is left for it, instead of waiting for more (isolated trials)."""


@dataclass(frozen=True)
class Group:
    """What Ray gives a lane."""

    workers: int
    cuda: bool
    resources: Mapping[str, float]
    """Of each worker."""
    storage: str
    """Folder for what Ray Train keeps."""
    restarts: int
    """How often a group that dies is started again."""


def lane_worker(settings: LaneSettings) -> None:
    """Work as one of a lane's workers, until the broker closes."""
    from rayft.sweep.lane import work

    work(settings)


class LaneHost:
    """An actor that holds one Ray Train run, a lane, until its workers end."""

    def run(self, settings: LaneSettings, group: Group) -> None:
        """Start the worker group and wait; a group that dies is started again."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        trainer = TorchTrainer(
            # Ray hands any one object on; its annotations say a dict.
            lane_worker,  # type: ignore[arg-type]
            train_loop_config=settings,  # type: ignore[arg-type]
            scaling_config=ScalingConfig(
                num_workers=group.workers, use_gpu=group.cuda, resources_per_worker=dict(group.resources)
            ),
            torch_config=TorchConfig(backend="nccl" if group.cuda else "gloo"),
            run_config=RunConfig(
                name=settings.name,
                storage_path=group.storage,
                failure_config=FailureConfig(max_failures=group.restarts),
                callbacks=[_deaths(settings, group)],
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  (whatever ended the group, the waiting jobs must hear it)
            if disk_full(error):
                _end_all(settings, group, error)
            message = f"lane {settings.name} ended: {_reason(error)}"
            ray.get(settings.broker.lane_lost.remote(settings.name, message))


def _deaths(settings: LaneSettings, group: Group) -> Any:
    """Return a callback of Ray Train's that tells the broker why a lane's workers ended."""
    from ray.train import UserCallback

    class Deaths(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            first = worker_exceptions[min(worker_exceptions)]
            if disk_full(first):
                _end_all(settings, group, first)
            ray.get(settings.broker.lane_died.remote(settings.name, _reason(first)))

    return Deaths()


def _end_all(settings: LaneSettings, group: Group, error: Exception) -> None:
    """End the sweep: no lane can be started again on a full disk."""
    full = disk_full_error(error, Path(group.storage), Path(tempfile.gettempdir()))
    ray.get(settings.broker.fail_all.remote(str(full)))


def _reason(error: Exception) -> str:
    """Return in one line why a worker ended; Ray's own text lists all processes of the machine."""
    text = str(error)
    if "running low on memory" in text or "OutOfMemory" in type(error).__name__:
        return (
            "Ray ended it because the machine ran out of memory; lower sweep.lanes, data.max_length or "
            "optim.rows_per_step, set scale.activation_checkpointing, or take a machine with more (Ray acts "
            "at the share of memory in RAY_memory_usage_threshold, 0.95)"
        )
    if "ActorDied" in type(error).__name__ or "ActorUnavailable" in type(error).__name__:
        return "its process was killed or crashed; the worker logs in Ray's session folder may say why"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason was given'}"


class Launcher:
    """An actor that starts hosts and owns them: trials come and go, the driver's launcher stays."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._hosts: dict[Any, Any] = {}

    def start(self, settings: LaneSettings) -> None:
        """Start a lane's host; hosts that have ended are let go."""
        self._reap(timeout=0)
        host: Any = ray.remote(LaneHost).options(num_cpus=0).remote()
        self._hosts[host.run.remote(settings, self._group)] = host

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

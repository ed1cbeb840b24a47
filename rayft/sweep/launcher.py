"""The launcher: the process between a sweep and its workers, which starts the lanes.

Ray starts it, a controller for each lane, and the workers one after the other, so what they import adds up
before a lane takes its first job. Hence nothing of torch, DeepSpeed or MLflow is imported here:
`lane_worker`, which Ray hands through all of them, imports the lane where it runs.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rayft.files import disk_full, disk_full_error

__all__ = ["Group", "LaneSettings", "Launcher", "lane_worker", "why_ended"]


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


def lane_worker(settings: LaneSettings) -> None:
    """Work as one of a lane's workers, until the broker closes."""
    from rayft.sweep.lane import work

    work(settings)


class Launcher:
    """An actor that holds lanes, each a Ray Train run in a thread: trials come and go, the launcher stays."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._lanes: list[threading.Thread] = []

    def start(self, settings: LaneSettings) -> None:
        """Start a lane, and again whenever it dies, as long as the broker has work for it."""
        lane = threading.Thread(target=self._hold, args=(settings,), name=settings.name, daemon=True)
        self._lanes = [*filter(threading.Thread.is_alive, self._lanes), lane]
        lane.start()

    def stay(self) -> None:
        """Return never: whoever waits for it hears when this process has ended."""
        threading.Event().wait()

    def close(self, timeout: float) -> None:
        """Wait until the lanes have ended; those that don't end with this process."""
        deadline = time.monotonic() + timeout
        for lane in self._lanes:
            lane.join(max(0.0, deadline - time.monotonic()))

    def _hold(self, settings: LaneSettings) -> None:
        while True:
            reason = _run(settings, self._group)
            if not reason or not ray.get(settings.broker.lane_died.remote(settings.name, reason)):
                return
            _release()


def _run(settings: LaneSettings, group: Group) -> str:
    """Start a worker group, wait for its end, and return why it ended; empty if its work is done."""
    from ray.train import RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        # Ray hands any one object on; its annotations say a dict.
        lane_worker,  # type: ignore[arg-type]
        train_loop_config=settings,  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=group.workers, use_gpu=group.cuda, resources_per_worker=dict(group.resources)
        ),
        torch_config=TorchConfig(backend="nccl" if group.cuda else "gloo"),
        run_config=RunConfig(name=settings.name, storage_path=group.storage),
    )
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001  (whatever ended the group, the waiting jobs must hear it)
        first = error
        if isinstance(error, WorkerGroupError) and error.worker_failures:
            first = error.worker_failures[min(error.worker_failures)]
        if disk_full(first):
            _end_all(settings, group, first)
        return why_ended(first)
    return ""


def _release() -> None:
    """Give back the resources that Ray Train's controllers reserved for their workers before they died.

    Ray Train has an actor for that, which needs Ray's dashboard; a cluster that rayft starts has none.
    """
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for found in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(found)
        left = group.creator_actor_dead and group.state != PlacementGroupTableData.REMOVED
        if left and group.creator_job_id.hex() == job and not group.is_detached:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def _end_all(settings: LaneSettings, group: Group, error: Exception) -> None:
    """End the sweep: no worker group can be started again on a full disk."""
    full = disk_full_error(error, Path(group.storage), Path(tempfile.gettempdir()))
    ray.get(settings.broker.fail_all.remote(str(full)))


def why_ended(error: Exception) -> str:
    """Return in one line why a process of Ray's ended; Ray's own text lists all processes of the machine."""
    text = str(error)
    if "running low on memory" in text or "OutOfMemory" in type(error).__name__:
        return (
            "Ray ended it because the machine ran out of memory; lower sweep.lanes, data.max_length or "
            "optim.rows_per_step, set scale.activation_checkpointing, or take a machine with more (Ray acts "
            "at the share of memory in RAY_memory_usage_threshold, 0.95)"
        )
    if "ActorDied" in type(error).__name__ or "actor is dead" in text or "actor died" in text:
        return "its process was killed or crashed; the worker logs in Ray's session folder may say why"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason was given'}"

"""The launcher: the process between a sweep and its workers, which starts the lanes.

Ray starts it, a controller for each lane, and the workers one after the other, so what they import adds up
before a lane takes its first job. Hence nothing of torch, DeepSpeed or MLflow is imported here:
`lane_worker`, which Ray hands through all of them, imports the lane where it runs.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.files import disk_full, disk_full_error

__all__ = [
    "NODE_LOST",
    "UNREACHABLE",
    "Group",
    "HomeNode",
    "LaneSettings",
    "Launcher",
    "lane_worker",
    "waiting_text",
    "why_ended",
]


@dataclass(frozen=True)
class LaneSettings:
    """What a lane's workers are told when they start."""

    name: str
    broker: Any
    """Handle of the broker actor."""
    home: HomeNode
    """Where the command's files are."""
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


WAITING_SECONDS = 20.0
"""How long lanes may wait for a place in the cluster before a person is told."""
REMIND_SECONDS = 600.0
"""After how long a person is told again."""
FILE_CALLS = 8
"""Lanes that send or fetch files at the same time."""
NODE_LOST = "its node was lost"
"""The reason of a lane that ended with its node; neither the lane nor its trial is to blame."""
UNREACHABLE = "its process can't be reached"
"""The reason of a lane whose node may be lost; Ray takes some seconds to be sure of that."""


@dataclass(frozen=True)
class HomeNode:
    """How a lane finds out whether it sees the disk of the node that the command runs on."""

    node: str
    """Id of the Ray node."""
    mark: str
    """A file that is there as long as the command runs: whoever sees it sees that disk."""
    launcher: Any
    """Handle of the launcher, whose `file_host` gives those the files who don't."""


REASONS = {NODE_LOST: 0, UNREACHABLE: 1}
"""Reasons that count before all others of a lane: if one worker is lost, the others fail as well."""


class Launcher:
    """An actor that holds lanes, each a Ray Train run in a thread: trials come and go, the launcher stays."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._lanes: list[threading.Thread] = []
        self._watched = False
        self._host: Any = None
        self._starting = threading.Lock()

    def start(self, settings: LaneSettings) -> None:
        """Start a lane, and again whenever it dies, as long as the broker has work for it."""
        if not self._watched:
            self._watched = True
            watch = threading.Thread(
                target=self._watch, args=(settings.broker,), name="rayft-watch", daemon=True
            )
            watch.start()
        lane = threading.Thread(target=self._hold, args=(settings,), name=settings.name, daemon=True)
        self._lanes = [*filter(threading.Thread.is_alive, self._lanes), lane]
        lane.start()

    def file_host(self) -> Any:
        """Return the handle of an actor on this node that reads and writes files for lanes elsewhere."""
        from rayft.sweep.transfer import FileHost

        with self._starting:
            if self._host is None:
                here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
                options = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": FILE_CALLS}
                self._host = ray.remote(FileHost).options(**options).remote()
            return self._host

    def stay(self) -> None:
        """Return never: whoever waits for it hears when this process has ended."""
        threading.Event().wait()

    def close(self, timeout: float) -> None:
        """Wait until the lanes that have started have ended; the others end with this process."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            alive = [lane for lane in self._lanes if lane.is_alive()]
            if not alive or len(alive) <= len(_waiting()):
                return
            alive[0].join(0.1)

    def _watch(self, broker: Any) -> None:
        """Tell a person of lanes that wait for a place: what they ask for, and what is free."""
        since: float | None = None
        told = 0.0
        while True:
            time.sleep(WAITING_SECONDS / 4)
            waiting, now = len(_waiting()), time.monotonic()
            if not waiting:
                if told:
                    broker.tell.remote("all lanes have a place")
                since, told = None, 0.0
                continue
            since = since or now
            if now - since >= WAITING_SECONDS and (not told or now - told >= REMIND_SECONDS):
                told = now
                broker.tell.remote(waiting_text(waiting, self._group, *_nodes()))

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
            failures = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
            # The others fail because one of them is gone.
            first = min(failures, key=lambda one: REASONS.get(why_ended(one), len(REASONS)))
        if disk_full(first):
            _end_all(settings, group, first)
        return why_ended(first)
    return ""


def _release() -> None:
    """Give back the resources that Ray Train's controllers reserved for their workers before they died.

    Ray Train has an actor for that, which needs Ray's dashboard; a cluster that rayft starts has none.
    """
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group in _placement_groups():
        if group.creator_actor_dead:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def _waiting() -> list[Any]:
    """Return the placement groups of this command's lanes that Ray has found no place for."""
    return [group for group in _placement_groups() if group.state in (group.PENDING, group.RESCHEDULING)]


def _placement_groups() -> Iterator[Any]:
    """Return the placement groups that this command's actors have, as Ray's control store describes them."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]

    job = ray.get_runtime_context().get_job_id()
    for found in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(found)
        gone = group.state == PlacementGroupTableData.REMOVED
        if group.creator_job_id.hex() == job and not gone and not group.is_detached:
            yield group


def _nodes() -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Return what each living node has, and what of it is free: address → resource → amount."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    names = {
        key: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for key, node in nodes.items()
    }
    return (
        {names[key]: node["Resources"] for key, node in nodes.items()},
        {names[key]: free.get(key, {}) for key in nodes},
    )


def waiting_text(
    lanes: int,
    group: Group,
    total: Mapping[str, Mapping[str, float]],
    free: Mapping[str, Mapping[str, float]],
) -> str:
    """Return what a person reads who waits for lanes that have no place.

    Args:
        lanes: how many wait.
        group: what each of them asks for.
        total: what each node has: name → resource → amount.
        free: what of it is free.
    """
    asked = " and ".join(f"{amount:g} {name}" for name, amount in group.resources.items())
    workers = f"{group.workers} times {asked}" if group.workers > 1 else asked
    there = "; ".join(
        f"{name}: "
        + ", ".join(f"{free[name].get(kind, 0):g} of {has.get(kind, 0):g} {kind}" for kind in group.resources)
        for name, has in total.items()
    )
    return (
        f"{lanes} lane{'s wait' if lanes > 1 else ' waits'} for a place in the cluster; each lane needs "
        f"{workers}. Free: {there}. A lane starts as soon as there is room; if there will be none, lower "
        "scale.workers or sweep.lanes and run the command again"
    )


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
    if "node has died" in text or "NodeDied" in type(error).__name__ or "node is dead" in text:
        return NODE_LOST
    if "is unavailable" in text or "failed to connect" in text.lower():
        return UNREACHABLE
    if "ActorDied" in type(error).__name__ or "actor is dead" in text or "actor died" in text:
        return "its process was killed or crashed; the worker logs in Ray's session folder may say why"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason was given'}"

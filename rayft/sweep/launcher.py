"""The launcher: the process that starts the lanes, and starts them again when they die.

Ray starts the launcher and the workers of a lane one after the other, so their import times add up before the
lane takes its first job. Therefore this module imports neither DeepSpeed nor MLflow, and torch only because
Ray Train does: `lane_worker`, which Ray passes on, imports the lane only where it runs.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.files import disk_full, disk_full_error
from rayft.sweep.reasons import severity, why_ended
from rayft.sweep.settings import Group, LaneSettings

__all__ = ["Launcher", "lane_worker", "waiting_text"]

logger = logging.getLogger(__name__)

WAITING_SECONDS = 20.0
"""How long lanes may wait for a place in the cluster before the user is notified."""
REMIND_SECONDS = 600.0
"""Time until the user is notified again."""
FILE_CALLS = 8
"""Number of lanes that can send or fetch files at the same time."""


def lane_worker(settings: LaneSettings) -> None:
    """Run one worker of a lane, until the broker closes."""
    from rayft.sweep.lane import serve_jobs

    serve_jobs(settings)


class Launcher:
    """An actor that holds the lanes, each a Ray Train run in a thread of its own."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._lanes: list[threading.Thread] = []
        self._watched = False
        self._host: Any = None
        self._starting = threading.Lock()

    def start(self, settings: LaneSettings) -> None:
        """Start a lane, and start it again whenever it dies, as long as the broker has jobs for it."""
        # Ray calls this in several threads, and `close` must know every lane.
        with self._starting:
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
                # It has no state, so lanes that are started again can use the process that replaces it.
                self._host = ray.remote(FileHost).options(**options, max_restarts=-1).remote()
            return self._host

    def stay(self) -> None:
        """Never return: a caller that waits for it gets an error when this process ends."""
        threading.Event().wait()

    def close(self, timeout: float) -> None:
        """Wait until the lanes that have started have ended; the others end with this process.

        Args:
            timeout: seconds to wait at most.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            alive = [lane for lane in self._lanes if lane.is_alive()]
            if not alive or len(alive) <= len(_waiting()):
                return
            alive[0].join(0.1)

    def _watch(self, broker: Any) -> None:
        """Notify the user of lanes that wait for a place, or have one and do not start."""
        since: float | None = None
        noted = 0.0
        while True:
            time.sleep(WAITING_SECONDS / 4)
            try:
                waiting, now = len(_waiting()), time.monotonic()
                if not waiting:
                    if noted:
                        broker.note.remote("all lanes have a place")
                    since, noted = None, 0.0
                    broker.check_starts.remote()
                    continue
                since = since or now
                if now - since >= WAITING_SECONDS and (not noted or now - noted >= REMIND_SECONDS):
                    broker.note.remote(waiting_text(waiting, self._group, *_nodes()))
                    noted = now
            except Exception:
                # Ray's control store may not answer for a while, which Ray reports by errors of many kinds.
                logger.warning("can't see which lanes wait for a place", exc_info=True)

    def _hold(self, settings: LaneSettings) -> None:
        while True:
            settings.broker.starts.remote(settings.name)
            reason = _run(settings, self._group)
            if not reason or not ray.get(settings.broker.lane_died.remote(settings.name, reason)):
                return


def _run(settings: LaneSettings, group: Group) -> str:
    """Start a worker group, wait until it ends, and return why it ended; empty if it has done its jobs."""
    try:
        _fit(settings, group)
    except Exception as error:  # noqa: BLE001  (the waiting jobs must learn why the group ended)
        # Ray Train's WorkerGroupError has them; its class can't be used here, as its import may have failed.
        failures = getattr(error, "worker_failures", None) or {0: error}
        # One worker's end makes the others fail as well.
        first = min((failures[rank] for rank in sorted(failures)), key=severity)
        if disk_full(first):
            _end_all(settings, group, first)
        return why_ended(first)
    return ""


def _fit(settings: LaneSettings, group: Group) -> None:
    """Start a worker group, and wait until it ends."""
    # If this fails, Ray Train starts the actor itself, only later.
    with suppress(Exception):
        _start_coordinator()
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from rayft.sweep.lane_trainer import LaneTrainer

    LaneTrainer(
        # Ray passes any object on, although its annotations ask for a dict.
        lane_worker,  # type: ignore[arg-type]
        train_loop_config=settings,  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=group.workers, use_gpu=group.cuda, resources_per_worker=dict(group.resources)
        ),
        torch_config=TorchConfig(backend="nccl" if group.cuda else "gloo"),
        run_config=RunConfig(name=settings.name, storage_path=group.storage),
    ).fit()


def _start_coordinator() -> None:
    """Start the actor from which Ray Train requests resources, unless it runs already.

    Ray Train itself would start it after its imports, and then wait for it.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    get_or_create_autoscaling_coordinator()


def _waiting() -> list[Any]:
    """Return the placement groups of this command's lanes for which Ray has found no place."""
    return [group for group in _placement_groups() if group.state in (group.PENDING, group.RESCHEDULING)]


def _placement_groups() -> Iterator[Any]:
    """Yield the placement groups of this command's actors, as Ray's control store describes them."""
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]

    job = ray.get_runtime_context().get_job_id()
    for found in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(found)
        gone = group.state == PlacementGroupTableData.REMOVED
        if group.creator_job_id.hex() == job and not gone and not group.is_detached:
            yield group


def _nodes() -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Return the resources of each living node, and the free ones: address → resource → amount."""
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
    """Return the message for a user whose lanes wait for a place in the cluster.

    Args:
        lanes: the number of waiting lanes.
        group: the resources that each of them needs.
        total: the resources of each node: name → resource → amount.
        free: the free ones of them.
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
    """End the sweep, because no worker group can be started again on a full disk."""
    full = disk_full_error(error, Path(group.storage), Path(tempfile.gettempdir()))
    ray.get(settings.broker.fail_all.remote(str(full)))

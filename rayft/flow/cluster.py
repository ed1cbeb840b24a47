"""The Ray cluster a sweep runs on: the one that is there, or a local one for as long as it lasts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rayft.errors import ResourceError, TrackingError
from rayft.tracking.base import TrackerSpec

__all__ = ["check_tracking", "cluster"]

SLOTS = 2
"""CPU slots beside the workers': drivers of trials and of the serving application."""


@contextmanager
def cluster(workers: int, *, device: str) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS (as in a Ray job), or start a local one and stop it afterwards.

    The workers' logs stay in Ray's session folder, out of the terminal.

    Args:
        workers: training processes at once.
        device: `cpu` or `cuda`, what they need.

    Raises:
        ResourceError: if the cluster can't hold the workers.
    """
    if ray.is_initialized():
        yield
        return
    # Idle OpenMP threads of one process would spin on the cores that another one needs: with two
    # processes on two cores a step took minutes instead of a second and a half.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    address = os.environ.get("RAY_ADDRESS")
    cores = len(os.sched_getaffinity(0))
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="rayft")
    else:
        ray.init(
            num_cpus=max(cores, workers + SLOTS),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="rayft",
        )
    try:
        _check_fit(workers, device)
        yield
    finally:
        ray.shutdown()


def check_tracking(spec: TrackerSpec) -> None:
    """Refuse a sqlite file where workers may run on another machine than the one that has it.

    Raises:
        TrackingError: saying how to start a server instead.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1 and spec.uri.startswith("sqlite"):
        raise TrackingError(
            f"the cluster has {len(nodes)} nodes, and a sqlite file can't be shared by them; start "
            "`mlflow server` on one and set tracking.uri or MLFLOW_TRACKING_URI to it"
        )


def _check_fit(workers: int, device: str) -> None:
    resources = ray.cluster_resources()
    name = "GPU" if device == "cuda" else "CPU"
    # An autoscaler may still bring what is missing, and then says so itself.
    if resources.get(name, 0) < workers and len(ray.nodes()) == 1 and "RAY_ADDRESS" not in os.environ:
        raise ResourceError(
            f"{workers} workers need {workers} {name}s, this machine has {resources.get(name, 0):g}; lower "
            "scale.workers or sweep.lanes"
        )

"""The Ray cluster a sweep runs on: the one that is there, or a local one for as long as it lasts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from rayft.errors import ResourceError, TrackingError
from rayft.sweep.score import spread
from rayft.tracking.base import TrackerSpec

__all__ = ["check_tracking", "cluster", "has_gpus", "join"]

CURRENT = Path("/tmp/ray/ray_current_cluster")  # noqa: S108  (where `ray start` writes its address)
SLOTS = 2
"""CPU slots beside the workers': drivers of trials and of the serving application."""


def join() -> bool:
    """Join the cluster of RAY_ADDRESS, or the one that `ray start` runs on this machine, if there is one."""
    if ray.is_initialized():
        return True
    address = os.environ.get("RAY_ADDRESS")
    if not address and not CURRENT.is_file():
        return False
    _settle_environment()
    try:
        ray.init(
            address=address or CURRENT.read_text().strip(),
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="rayft",
        )
    except (ConnectionError, RuntimeError) as error:
        if address:
            raise ResourceError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); unset it"
            ) from error
        return False
    return True


def has_gpus() -> bool | None:
    """Whether the joined cluster has GPUs, or says by a resource `gpu_cluster` that they will come.

    None where no cluster is joined, and this machine is all there is.
    """
    if not ray.is_initialized():
        return None
    resources = ray.cluster_resources()
    return bool(resources.get("GPU", 0) or resources.get("gpu_cluster", 0))


def _settle_environment() -> None:
    # Idle OpenMP threads of one process would spin on the cores that another one needs: with two
    # processes on two cores a step took minutes instead of a second and a half.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def cluster(workers: int, *, device: str, gpu_share: float = 1.0) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS (as in a Ray job), or start a local one and stop it afterwards.

    The workers' logs stay in Ray's session folder, out of the terminal.

    Args:
        workers: training processes at once.
        device: `cpu` or `cuda`, what they need.
        gpu_share: how much of a GPU each of them takes.

    Raises:
        ResourceError: if the cluster can't hold the workers.
    """
    if ray.is_initialized():
        _check_fit(workers, device, gpu_share)
        yield
        return
    _settle_environment()
    if not join():
        cores = len(os.sched_getaffinity(0))
        ray.init(
            num_cpus=max(cores, workers + SLOTS),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="rayft",
        )
    try:
        _check_fit(workers, device, gpu_share)
        yield
    finally:
        ray.shutdown()


def check_tracking(spec: TrackerSpec) -> None:
    """Refuse a sqlite file where workers may run on another machine than the one that has it.

    Raises:
        TrackingError: saying how to start a server instead.
    """
    if spread() and spec.uri.startswith("sqlite"):
        raise TrackingError(
            "the cluster has several nodes, and a sqlite file can't be shared by them; start "
            "`mlflow server` on one and set tracking.uri or MLFLOW_TRACKING_URI to it"
        )


def _check_fit(workers: int, device: str, gpu_share: float) -> None:
    resources = ray.cluster_resources()
    name = "GPU" if device == "cuda" else "CPU"
    # An autoscaler may still bring what is missing, and then says so itself.
    elastic = spread() or resources.get("gpu_cluster", 0) or "RAY_ADDRESS" in os.environ
    # Two lanes of 0.6 don't fit on one GPU: shares of a worker are never split.
    per_device = int(1 / gpu_share + 1e-9) if device == "cuda" else 1
    needed = -(-workers // per_device)
    if resources.get(name, 0) < needed and not elastic:
        raise ResourceError(
            f"{workers} workers need {needed} {name}s, this machine has {resources.get(name, 0):g}; lower "
            "scale.workers or sweep.lanes"
        )

"""Join the Ray cluster that exists, or start one on this machine for the length of a command."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

from rayft.errors import ConfigError, ResourceError, TrackingError
from rayft.files import disk_full, disk_full_error
from rayft.flow.address import default_folder, find_address, joined, own, spread, unreachable
from rayft.flow.console import show_error
from rayft.flow.interrupt import end_at_once, interrupts
from rayft.flow.quiet import hide_ray_lines
from rayft.paths import check_folder, home, read_path, runs_folder

if TYPE_CHECKING:
    # Imported here, they would import torch before Ray starts (`rayft.flow.ahead`).
    from rayft.flow.config import TrainConfig
    from rayft.tracking.base import TrackerSpec

ConfigT = TypeVar("ConfigT", bound="TrainConfig")

__all__ = [
    "VARIABLES",
    "check_fit",
    "check_temporary",
    "check_tracking",
    "cluster",
    "has_gpus",
    "join",
    "placed",
    "start_cluster",
    "stop_cluster",
    "temporary_folders",
    "watched",
]

JOB_FOLDER = "runtime_resources"
"""Part of the path of a Ray job's working directory."""
SLOTS = 2
"""CPU slots besides those of the workers, for the drivers of trials and of the serving application."""
RAY_PROCESSES = ("gcs_server", "raylet")
"""Names of the processes that a Ray cluster on this machine needs."""
ENVIRONMENT = {
    # Seconds until the end or the death of a worker is noticed.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # A cloud takes back nodes of a cluster, but not this machine.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray would start an idle process for each core, of which a command uses two.
    "RAY_prestart_worker_first_driver": "0",
}
"""How Ray and Ray Train work on a cluster that a command starts, unless the user has set it."""
FOR_WORKERS = {
    # Idle OpenMP threads of one process would spin on the cores that another process needs: with two
    # processes on two cores, a step took minutes instead of a second and a half.
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What the processes of any cluster inherit, unless the user has set it."""
OF_LIBRARIES = ("PYTHONUTF8", "PYTHONBREAKPOINT", "RAY_USAGE_STATS_ENABLED")
"""Variables that are set whatever the user has set, the last two of them by Ray."""
VARIABLES = (*FOR_WORKERS, *ENVIRONMENT, *OF_LIBRARIES)
"""All environment variables that joining or starting a cluster sets."""
RAY_DIED = (
    "process {} of Ray has ended, which the cluster on this machine needs: it was killed, or the machine ran "
    "out of memory. Run the same command again: it continues from what is saved"
)
SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux, in bytes."""
SOCKET_NAME = "session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store"
"""The longest path that Ray adds to its temporary folder for a socket."""


def join() -> bool:
    """Join the cluster at RAY_ADDRESS, or the one that `ray start` has started on this machine.

    Returns:
        Whether a cluster was joined. If not, the folder that a local cluster needs has been checked.

    Raises:
        ResourceError: within ten seconds, if RAY_ADDRESS names a cluster that does not answer; or if a local
            cluster could not write its folder.
    """
    if own.started:
        return False
    if ray.is_initialized():
        return True
    address, named = find_address()
    problem = unreachable(address) if address else ""
    if problem and named:
        raise ResourceError(
            f"no Ray cluster can be joined at RAY_ADDRESS={address}: {problem}; correct it, or unset it to "
            "start a cluster on this machine"
        )
    if not address or problem:
        check_temporary()
        return False
    _settle_environment()
    try:
        with interrupts.renewed():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="rayft",
            )
    # Ray has no common error for what can be wrong with a cluster that answers: other versions, a machine
    # that is not one of its nodes, an unknown token.
    except Exception as error:
        if named:
            raise ResourceError(
                f"the Ray cluster at RAY_ADDRESS={address} can't be joined ({error}); unset it to start a "
                "cluster on this machine"
            ) from error
        check_temporary()
        return False
    own.joined = True
    return True


def placed(config: ConfigT) -> ConfigT:
    """Return a configuration with an absolute `output`.

    Without an `output`, the folder is named after the sweep and lies below `runs` in the working directory,
    or, on a cluster, below a folder that outlives the job.

    Raises:
        ConfigError: if `output` lies in the working directory of a Ray job, which Ray deletes.
    """
    if config.output is None:
        return config.model_copy(update={"output": str(default_folder(config.name))})
    if not config.folder.is_relative_to(Path.cwd()) or JOB_FOLDER not in Path.cwd().parts:
        return config.model_copy(update={"output": str(config.folder)})
    raise ConfigError(
        f"output: {config.output} lies in the working directory of a Ray job, which Ray deletes: write an "
        f"absolute path, or leave it out for {runs_folder(cluster=True) / config.name}"
    )


def check_temporary() -> None:
    """Check that Ray can write to the folder where a cluster on this machine keeps its sockets and logs.

    Raises:
        ResourceError, ConfigError: naming the environment variable that sets the folder.
    """
    setting = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "RAY_TMPDIR")
    if setting in os.environ:
        read_path(os.environ[setting], setting)
    folder = Path(get_default_ray_temp_dir())
    if not folder.is_absolute():
        raise ResourceError(
            f"{setting}={os.environ[setting]} is a relative path, which Ray can't use; write an absolute one"
        )
    if len(os.fsencode(folder / SOCKET_NAME)) > SOCKET_BYTES:
        raise ResourceError(
            f"{folder} is too long for Ray: the paths of its sockets, which lie below it, may have "
            f"{SOCKET_BYTES} bytes; set RAY_TMPDIR to a shorter path"
        )
    check_folder(folder, "RAY_TMPDIR or TMPDIR")


def temporary_folders() -> list[Path]:
    """Return the folders for temporary files: of this process, and of a Ray cluster on this machine."""
    return [Path(tempfile.gettempdir()), Path(get_default_ray_temp_dir())]


def has_gpus() -> bool | None:
    """Return whether the joined cluster has GPUs; None if none is joined, even if one was started here.

    A cluster whose GPU nodes start later declares them by a resource `gpu_cluster`.
    """
    if not joined():
        return None
    resources = ray.cluster_resources()
    return bool(resources.get("GPU", 0) or resources.get("gpu_cluster", 0))


def _settle_environment() -> None:
    for name, value in FOR_WORKERS.items():
        os.environ.setdefault(name, value)
    # Packages read their own files in the locale's encoding. Those of DeepSpeed are UTF-8 and fail in ASCII.
    os.environ["PYTHONUTF8"] = "1"
    if interrupts.installed:
        # This process is a command; a user's own program decides itself what it prints.
        hide_ray_lines()


def _settle_token() -> None:
    """Set a token for a cluster on this machine if Ray can't store one, in a read-only or missing home.

    Ray needs a token unless RAY_AUTH_MODE turns that off, and stores it in ~/.ray.
    """
    loader = AuthenticationTokenLoader.instance()
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or loader.has_token(ignore_auth_mode=True):
        return
    try:
        check_folder(home("RAY_AUTH_TOKEN") / ".ray", "HOME")
    except ResourceError:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        loader.reset_cache()


def start_cluster(cpus: int) -> None:
    """Start a cluster on this machine. It ends with `stop_cluster`, and with the thread that starts it.

    Args:
        cpus: its CPU slots, which may be more than there are cores.

    Raises:
        ResourceError: if Ray can't be started.
        DiskFullError: if there is no room for Ray's files.
    """
    _settle_environment()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    own.started = True
    try:
        _settle_token()
        with interrupts.renewed():
            ray.init(
                # Otherwise Ray would look for the address of a cluster that does not answer.
                address="local",
                num_cpus=max(len(os.sched_getaffinity(0)), cpus),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="rayft",
            )
    # Ray raises a bare Exception if its processes don't start in time.
    except Exception as error:
        if disk_full(error):
            raise disk_full_error(error, Path(get_default_ray_temp_dir())) from error
        raise ResourceError(
            f"Ray can't be started on this machine ({error}); `rayft doctor` shows what is missing"
        ) from error


def stop_cluster() -> None:
    """Leave the cluster, and end it if this process has started it."""
    ray.shutdown()
    own.started = own.joined = False


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def watched() -> Iterator[None]:
    """Run a block; if the local Ray cluster dies meanwhile, end this command within seconds.

    Without this, Ray tries for a minute to reach its control store (`gcs_server`), and then ends the process
    with its own message. What the command has saved is kept, as after any kill.
    """
    if not interrupts.installed:
        # This process is not a command but a user's own program, which must not be ended.
        yield
        return
    needed = [one for one in psutil.Process().children() if _alive(one) and one.name() in RAY_PROCESSES]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            dead = next((one for one in needed if not _alive(one)), None)
            if dead is not None and interrupts.received is not None:
                # The signal went to the whole process group, as `timeout` and batch systems send it.
                interrupts.show()
                end_at_once(interrupts.status)
            if dead is not None:
                show_error(ResourceError(RAY_DIED.format(dead.pid)))
                end_at_once(1)

    threading.Thread(target=watch, name="rayft-cluster-watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def cluster(workers: int, *, device: str, gpu_share: float = 1.0) -> Iterator[None]:
    """Join a cluster (`join`) for the length of a block, or start a local one and stop it afterwards.

    The logs of workers stay in Ray's session folder and are not printed. A joined cluster may lack nodes
    that start later; the launcher of the lanes reports what waits for them.

    Args:
        workers: how many training processes run at once.
        device: what each of them needs, `cpu` or `cuda`.
        gpu_share: share of a GPU that each of them takes.

    Raises:
        ResourceError: if this machine can't hold the workers.
    """
    if ray.is_initialized():
        yield
        return
    try:
        if not join():
            start_cluster(workers + SLOTS)
            check_fit(workers, device, gpu_share)
        with watched():
            yield
    finally:
        stop_cluster()


def check_tracking(spec: TrackerSpec) -> None:
    """Check that all workers can reach the tracking database: other machines can't reach a sqlite file.

    Raises:
        TrackingError: with how to start a server instead.
    """
    if spread() and spec.uri.startswith("sqlite"):
        raise TrackingError(
            "the cluster has several nodes, and a sqlite file can't be shared by them; start "
            "`mlflow server` on one and set tracking.uri or MLFLOW_TRACKING_URI to it"
        )


def check_fit(workers: int, device: str, gpu_share: float) -> None:
    """Check that the cluster on this machine can hold the workers.

    Args:
        workers: how many training processes run at once.
        device: what each of them needs, `cpu` or `cuda`.
        gpu_share: share of a GPU that each of them takes.

    Raises:
        ResourceError: naming the settings to lower.
    """
    name = "GPU" if device == "cuda" else "CPU"
    there = ray.cluster_resources().get(name, 0)
    # The share of a worker is never split over GPUs: two lanes of 0.6 don't fit on one.
    per_device = int(1 / gpu_share + 1e-9) if device == "cuda" else 1
    needed = -(-workers // per_device)
    if there < needed:
        raise ResourceError(
            f"{workers} workers need {needed} {name}s, this machine has {there:g}; lower "
            "scale.workers or sweep.lanes"
        )

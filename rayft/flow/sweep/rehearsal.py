"""Rehearse a sweep on this machine's GPU, unless the compilers' caches have its kernels already.

A file in rayft's cache (`rayft cache list probes`) marks what was rehearsed. Its name is a hash of everything
that compiling depends on. It counts as long as the compilers' caches have not become smaller.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from rayft import __version__
from rayft.errors import DiskFullError
from rayft.files import write_file
from rayft.flow.address import on_cluster
from rayft.flow.config import PipelineConfig, load_config
from rayft.kernels.launch_triton import inductor_cache, kernel_cache
from rayft.models.files import cache_folder
from rayft.models.load import is_here, load_skeleton
from rayft.sweep.executor import MOST_SLOTS
from rayft.sweep.space import check_slots, points
from rayft.train.run import RunConfig

__all__ = ["known", "mark", "mark_file", "refusal", "rehearse_sweep"]

DEVICE = "cuda:0"
"""The GPU, by the name that lanes use: Inductor's cache distinguishes kernels by it."""
MEMORY = 0.25
"""Largest share of a lane's memory that the rehearsal takes."""
LARGEST = 0.5
"""Share of the GPU's memory that a base may take, so that it is loaded beside the rehearsal in any case."""
FREE = 0.5
"""Share of the GPU's memory that must be free."""
HOST_BYTES = 2**34
"""Memory of the host that must be free: this process takes some gigabytes, and lanes must not lack them."""
COMPUTE_MODE = 20
"""CUDA's number of the attribute that says whether several processes may use a GPU."""
logger = logging.getLogger(__name__)


def rehearse_sweep(
    config: str, overrides: Sequence[str], scratch: Path, found: Callable[[Path], object]
) -> None:
    """Rehearse the first steps of a sweep on this machine's GPU, unless there is no need to.

    Args:
        config: a file, or the name of a packaged configuration.
        overrides: settings of the configuration.
        scratch: folder for files that nobody needs afterwards.
        found: called with the sweep's folder, where a log may be written once lanes are started there.

    Raises:
        Exception: whatever is wrong with the configuration, the base or the GPU. The command's own checks
            say what a user has to know about it.
    """
    settings = load_config(config, overrides)
    found(settings.folder)
    if reason := refusal(settings):
        logger.info("no rehearsal: %s", reason)
        return
    run = settings.run(gpus=True)
    _await(run)
    trials = points(settings.sweep, run)
    base = load_skeleton(run.model)
    slots, _ = check_slots(settings.sweep, trials, base)
    runs = [trial.run for trial in trials]
    if reason := _no_room(run, base):
        logger.info("no rehearsal: %s", reason)
        return
    file = mark_file(runs[:MOST_SLOTS], slots, base.config.to_dict(), _machine())
    if known(file):
        logger.info("no rehearsal: what it would compile is known (%s)", file.name)
        return
    # Imported here, because it imports DeepSpeed.
    from rayft.train.rehearsal import rehearse

    # As a lane does: Inductor's cache distinguishes kernels for CPUs by it.
    torch.set_num_threads(run.scale.threads or 1)
    torch.cuda.set_per_process_memory_fraction(MEMORY * run.scale.gpu_share, DEVICE)
    rehearse(runs, slots, DEVICE, scratch)
    mark(file)
    logger.info("done")


def refusal(settings: PipelineConfig) -> str:
    """Return why a sweep is not rehearsed, as a clause, by its settings and this machine; empty if it is."""
    scale, model = settings.scale, settings.model
    reasons: dict[str, Callable[[], bool]] = {
        f"scale.device is {scale.device}": lambda: scale.device == "cpu",
        "there is no GPU": lambda: not torch.cuda.is_available(),
        f"model.task is {model.task}": lambda: model.task != "causal_lm",
        "the base is quantised": lambda: model.quantize is not None,
        "ZeRO-3 partitions the base": lambda: scale.zero == 3,
        "nothing is packed or fused": lambda: settings.sweep.slots == 1 and scale.fused is False,
        "a GGUF file's shapes are known when it is converted": lambda: model.name.endswith(".gguf"),
        "the host has little free memory": lambda: psutil.virtual_memory().available < HOST_BYTES,
        "the sweep runs on a cluster": on_cluster,
        "only one process may use the GPU": _is_exclusive,
    }
    return next((reason for reason, true in reasons.items() if true()), "")


def _is_exclusive() -> bool:
    """Return whether only one process, which must be the lane, may use the GPU; true if not known."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, mode = ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    status = status or driver.cuDeviceGetAttribute(ctypes.byref(mode), COMPUTE_MODE, device)
    return bool(status or mode.value)


def _await(run: RunConfig) -> None:
    """Wait until the command has downloaded or converted the base's configuration."""
    while not is_here(run.model.name, run.model.revision):
        time.sleep(0.5)


def _no_room(run: RunConfig, base: torch.nn.Module) -> str:
    """Return why the GPU has no room for a rehearsal, as a clause; empty if it has."""
    free, total = torch.cuda.mem_get_info(DEVICE)
    size = sum(parameter.numel() for parameter in base.parameters()) * run.scale.torch_dtype.itemsize
    if free < FREE * total:
        return "other programs use the GPU"
    return "the base takes most of the GPU's memory" if size > LARGEST * total else ""


def _machine() -> dict[str, Any]:
    """Return what compiling depends on beside the sweep: the GPU, and the releases of packages."""
    device, found = torch.cuda.get_device_properties(DEVICE), {}
    for name in ("torch", "triton", "transformers", "deepspeed"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {"device": [device.name, device.total_memory], "versions": {**found, "rayft": __version__}}


def mark_file(
    runs: Sequence[RunConfig], slots: int | None, base: dict[str, Any], machine: dict[str, Any]
) -> Path:
    """Return the file that marks what was rehearsed, named by all that compiling depends on.

    Args:
        runs: the trials that are rehearsed.
        slots: the most of them that share a step; None if that is found out.
        base: the base's configuration.
        machine: GPU and releases.
    """
    found = {
        "base": base,
        "scale": runs[0].scale.model_dump(mode="json"),
        "data": [runs[0].data.max_length, runs[0].data.packing],
        "rows": [run.optim.rows_per_step for run in runs],
        "methods": [run.method.model_dump(mode="json") for run in runs],
        "slots": slots,
        **machine,
    }
    key = hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return cache_folder() / "probes" / f"{key}.json"


def known(file: Path) -> bool:
    """Return whether something was rehearsed, and the compilers' caches have what was compiled."""
    try:
        sizes = json.loads(file.read_text(encoding="utf-8"))["rehearsed"]
        return bool(sizes) and all(_entries(folder) >= count for folder, count in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def mark(file: Path) -> None:
    """Mark what was rehearsed, with the number of entries that the compilers' caches have."""
    # Inductor has set the folder of Triton's cache, if it has compiled anything.
    folders = [str(folder) for folder in (inductor_cache(), kernel_cache()) if folder and folder.is_dir()]
    # Without a writable cache, each command rehearses anew.
    with suppress(OSError, DiskFullError):
        write_file(file, json.dumps({"rehearsed": {folder: _entries(folder) for folder in folders}}))


def _entries(folder: str) -> int:
    return len(os.listdir(folder))

"""How many bytes a sweep may write, and whether the disks that it writes to have room for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ray._common.utils import get_default_ray_temp_dir

from rayft.config import content_hash
from rayft.errors import DiskFullError
from rayft.flow.address import joined
from rayft.flow.config import PipelineConfig
from rayft.methods.base import LayerShape, MethodConfig
from rayft.models.files import cache_folder
from rayft.models.load import load_skeleton
from rayft.models.methods import method
from rayft.models.targets import select
from rayft.sweep.space import Point
from rayft.train.run import RunConfig, why_alone

__all__ = ["check_disk", "check_other_disks", "derived_bytes", "trial_bytes"]

CHECKPOINT = 20
"""Bytes in a checkpoint for each trained number: the weight, its fp32 master, two moments, and the weight of
the best evaluation."""
MARGIN = 2**30
"""Bytes of the output folder's disk that must stay free."""
SCRATCH = 2**28
"""Bytes that must be free in other folders that a sweep writes to: Ray's logs, temporary files, caches."""
RAY_FULL = 0.95
"""Ray moves no objects to a disk of which more than this share is used."""


def trial_bytes(
    points: Sequence[Point], shapes: dict[str, tuple[int, int]], lanes: int, slots: int = 1
) -> int:
    """Return the most bytes that the trials of a sweep keep at once: adapters, trails and checkpoints.

    Args:
        points: the trials.
        shapes: linear layer of the base → its shape (outputs, inputs).
        lanes: number of lanes.
        slots: how many trials share the steps of a lane, of those that can.
    """
    configs = {content_hash(point.run.method): point.run.method for point in points}
    stored = {key: _stored(config, shapes) for key, config in configs.items()}
    kept = sum(stored[content_hash(point.run.method)] * _bytes_of_a_number(point.run) for point in points)
    # A trial that has ended keeps one checkpoint; one that trains keeps two, and writes a third beside them.
    sharing = [stored[content_hash(point.run.method)] for point in points if not why_alone(point.run)]
    busy = max(max(stored.values()), sum(sorted(sharing, reverse=True)[:slots]))
    return kept + lanes * 2 * CHECKPOINT * busy


def _stored(config: MethodConfig, shapes: dict[str, tuple[int, int]]) -> int:
    """Return how many numbers an adapter of a method stores."""
    kind = method(config.name)
    names = select(shapes, config.targets)
    return sum(kind.stored(LayerShape(*shapes[name]), config.of(name).rank, config.links) for name in names)


def _bytes_of_a_number(run: RunConfig) -> int:
    """Return the bytes that a trial writes for each number that its adapter stores."""
    # The adapter takes 4 bytes a number, and so does each adapter of the trail; then the checkpoint.
    kept = run.evaluate.trail and not method(run.method.name).saves_model
    trail = run.optim.steps // (run.evaluate.every or run.optim.steps) if kept else 0
    return 4 * (1 + trail) + CHECKPOINT


def derived_bytes(config: PipelineConfig, points: Sequence[Point], shapes: dict[str, tuple[int, int]]) -> int:
    """Return the bytes that a sweep writes besides its trials: whole models, squeezed and tracked adapters.

    Args:
        config: the sweep's.
        points: the trials.
        shapes: linear layer of the base → its shape (outputs, inputs).
    """
    whole = [point for point in points if method(point.run.method.name).saves_model]
    total = 0
    if whole:
        parameters = load_skeleton(config.model).parameters()
        total = 4 * len(whole) * sum(parameter.numel() for parameter in parameters)
    ranks = [point.run.method for point in points if method(point.run.method.name).exports_lora]
    largest = max((_stored(one, shapes) for one in ranks), default=0)
    squeeze = config.squeeze
    targets = len(squeeze.ranks) + (squeeze.energy is not None) + (squeeze.budget is not None)
    made = squeeze.winners * (1 + targets * (2 if squeeze.cont else 1))
    continued = CHECKPOINT * largest * squeeze.winners * targets if squeeze.cont else 0
    # MLflow's artifacts hold another copy of each trial's adapter, of each squeezed one, and of the winner.
    return total + 4 * largest * (len(ranks) + 2 * made + 1) + continued


def check_disk(output: Path, trials: int, derived: int) -> None:
    """Check that an output folder has room for what a sweep writes there.

    Args:
        output: the folder.
        trials: bytes of the trials' adapters, trails and checkpoints.
        derived: bytes of whole models, and of squeezed and tracked adapters.

    Raises:
        DiskFullError: naming the bytes that are needed and those that are free.
    """
    free, needed = shutil.disk_usage(output).free, trials + derived
    if free < needed + MARGIN:
        raise DiskFullError(
            f"the sweep may write {_gib(needed)} below {output} ({_gib(trials)} of adapters and "
            f"checkpoints, {_gib(derived)} of whole models, squeezed and tracked adapters), but only "
            f"{_gib(free)} are free, of which {_gib(MARGIN)} must stay free; free some, or choose another "
            "folder with --set output=…"
        )


def check_other_disks(output: Path) -> tuple[str, ...]:
    """Check that the other folders which a sweep writes to have room.

    Returns:
        A warning if the disk of Ray's folder is so full that Ray moves no objects to it.

    Raises:
        DiskFullError: naming the folder, and the environment variable that moves it.
    """
    ray_folder = Path(get_default_ray_temp_dir())
    places = {
        "TMPDIR": Path(tempfile.gettempdir()),
        "RAYFT_CACHE": cache_folder(),
        # On a joined cluster, whoever started it has chosen the folder of its session.
        **({} if joined() else {"RAY_TMPDIR": ray_folder}),
    }
    for setting, folder in places.items():
        there = _existing(folder)
        free = shutil.disk_usage(there).free
        if os.stat(there).st_dev != os.stat(output).st_dev and free < SCRATCH:
            raise DiskFullError(
                f"a sweep writes to {folder} too, whose disk has only {free / 2**20:.0f} MiB free, and "
                f"{SCRATCH // 2**20} MiB are needed; free some, or set {setting} to another folder"
            )
    usage = shutil.disk_usage(_existing(ray_folder))
    if "RAY_TMPDIR" in places and usage.free < (1 - RAY_FULL) * usage.total:
        return (
            f"the disk of {ray_folder} is more than {RAY_FULL:.0%} full, so Ray can't move objects from "
            "memory to it; free some, or set RAY_TMPDIR to a folder on another disk",
        )
    return ()


def _existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"

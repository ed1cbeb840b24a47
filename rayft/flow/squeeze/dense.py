"""Extract a LoRA from a folder without low-rank factors: a fine-tuned model, or an adapter of PEFT."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayft.artifacts import CONFIG_FILE
from rayft.artifacts.lora_settings import read_json
from rayft.artifacts.read import read_meta
from rayft.errors import SqueezeError
from rayft.flow.squeeze.make import Target
from rayft.models.base import base_of, pinned
from rayft.models.extract import Extraction, extract_full, extract_peft
from rayft.models.load import ModelConfig, load_skeleton
from rayft.models.targets import linear_shapes
from rayft.peft.folder import PeftFolder
from rayft.squeeze.rank import Progress

__all__ = ["Dense", "dense_source", "extract", "files_digest", "lost_text"]

RANK = 64
"""Highest rank that is extracted where the target is a budget."""
SAMPLE = 2**16
"""How many bytes of each end of a file of weights are hashed."""


@dataclass(frozen=True)
class Dense:
    """A folder whose update of the base has no low-rank factors."""

    folder: Path
    whole: bool
    """Whether it is a whole model; otherwise it is an adapter."""
    adapter: PeftFolder | None = None
    """The adapter without its tensors; None for a whole model."""


def dense_source(folder: Path) -> Dense | None:
    """Return a folder as a source without factors; None for a LoRA, and for a folder of neither kind.

    A folder of neither kind is refused when it is loaded as an adapter.

    Raises:
        ArtifactError: if its configuration can't be read.
    """
    if (folder / CONFIG_FILE).is_file():
        config = read_json(folder)
        if config["peft_type"].upper() == "LORA":
            return None
        return Dense(folder, whole=False, adapter=PeftFolder(config, {}, read_meta(folder, config)))
    return Dense(folder, whole=True) if (folder / "config.json").is_file() else None


def extract(
    source: Dense, base: ModelConfig | None, targets: Sequence[Target], device: str | None, progress: Progress
) -> Extraction:
    """Extract a LoRA whose rank is high enough for all targets.

    Args:
        source: what it is extracted from.
        base: the base; the one that the source names if not given.
        targets: the targets, either ranks and budgets or energies.
        device: where to compute; the CPU if not given.
        progress: called with 1 for each module that is finished.

    Raises:
        SqueezeError: if the base is not known, or if there are ranks and energies among the targets.
        RayftError: as `extract_full` and `extract_peft`.
    """
    named = base_of(source.adapter) if source.adapter is not None else None
    model = pinned(base, source.adapter) if base is not None else named
    if model is None:
        raise SqueezeError(
            f"{source.folder} is a whole model, whose update is its difference from its base: name the base "
            "with --base"
        )
    ranks = [target.rank for target in targets if target.rank is not None]
    energies = [target.energy for target in targets if target.energy is not None]
    if ranks and energies:
        raise SqueezeError(
            f"{source.folder} has no factors, so a LoRA is extracted from it, either for ranks or for "
            "energies: ask for one kind at a time"
        )
    energy = max(energies, default=None)
    rank = None if energy is not None else max(ranks, default=None) or _highest(model)

    def advance(module: str, done: int, total: int) -> None:
        progress(1)

    if source.whole:
        return extract_full(
            model, source.folder, rank=rank, energy=energy, device=device or "cpu", progress=advance
        )
    return extract_peft(
        source.folder, model, rank=rank, energy=energy, device=device or "cpu", progress=advance
    )


def lost_text(found: Extraction) -> str:
    """Return which changes of the base an extraction lost, for the user; empty if none."""
    if not found.lost:
        return ""
    name, share = next(iter(found.lost.items()))
    return (
        f"not in the adapter: {len(found.lost)} parameters outside its modules that training changed, "
        f"{name} most (by {100 * share:.2g} % of its norm); score it before you use it"
    )


def files_digest(folder: Path) -> str:
    """Return a hash (16 hex digits) of the files of weights in a folder, and of an adapter's configuration.

    Of each file of weights its name, its size and both ends are hashed.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / CONFIG_FILE]):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name}\0{size}\0".encode() + file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def _highest(model: ModelConfig) -> int:
    shapes = linear_shapes(load_skeleton(model))
    return min(RANK, max(min(shape) for shape in shapes.values()))

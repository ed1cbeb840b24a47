"""What has no factors, as a LoRA: a fine-tuned model's folder, or an adapter of PEFT that is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayft.artifacts import CONFIG_FILE
from rayft.artifacts.lora_settings import read_json
from rayft.errors import SqueezeError
from rayft.flow.squeeze.make import Target
from rayft.models.extract import Extraction, extract_full, extract_peft
from rayft.models.load import ModelConfig, load_skeleton
from rayft.models.targets import linear_shapes
from rayft.squeeze.rank import Progress

__all__ = ["Dense", "dense_source", "extract", "lost_text"]

RANK = 64
"""Rank that is extracted where a budget says how far, at most."""


@dataclass(frozen=True)
class Dense:
    """A source without factors."""

    folder: Path
    whole: bool
    """Whether it is a model folder."""
    named: str
    """The base that it names itself; empty if none."""


def dense_source(folder: Path) -> Dense | None:
    """Tell whether a folder has no factors; None for a LoRA and for what is neither, which is refused later.

    Raises:
        ArtifactError: if its configuration can't be read.
    """
    if (folder / CONFIG_FILE).is_file():
        config = read_json(folder)
        if config["peft_type"].upper() == "LORA":
            return None
        return Dense(folder, whole=False, named=str(config.get("base_model_name_or_path") or ""))
    return Dense(folder, whole=True, named="") if (folder / "config.json").is_file() else None


def extract(
    source: Dense, base: ModelConfig | None, targets: Sequence[Target], device: str | None, progress: Progress
) -> Extraction:
    """Make a LoRA that is high enough in rank for all targets.

    Raises:
        SqueezeError: if the base is not known, or the targets are of several kinds.
        RayftError: as `extract_full` and `extract_peft`.
    """
    model = base or (ModelConfig(name=source.named) if source.named else None)
    if model is None:
        raise SqueezeError(
            f"{source.folder} is a whole model, and its update is what it has above its base: name that with "
            "--base"
        )
    ranks = [target.rank for target in targets if target.rank is not None]
    energies = [target.energy for target in targets if target.energy is not None]
    if ranks and energies:
        raise SqueezeError(
            f"{source.folder} has no factors, so it is extracted for ranks or for energies: ask for one kind "
            "at a time"
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
    """Say what an extraction could not take along; empty if nothing."""
    if not found.lost:
        return ""
    name, share = next(iter(found.lost.items()))
    return (
        f"not in the adapter: {len(found.lost)} parameters outside its modules that training changed, "
        f"{name} most (by {100 * share:.2g} % of its norm); score it before you use it"
    )


def _highest(model: ModelConfig) -> int:
    shapes = linear_shapes(load_skeleton(model))
    return min(RANK, max(min(shape) for shape in shapes.values()))

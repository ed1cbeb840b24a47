"""A full fine-tune as a LoRA: the leading singular values of W_tuned − W_base, layer by layer.

    ΔW = W_tuned − W_base  (O × I, float32)        ΔW ≈ B·A,  B (O × k), A (k × I)

Both checkpoints stay on disk; in memory are one layer's ΔW and a block of rows of each checkpoint. What
else training changed (embeddings, norms, biases, the output layer, layers that are no targets) has no place
in a LoRA: it is measured, so that whoever uses the adapter knows what was lost. Heads travel whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.models.checkpoint import Checkpoint, Stored
from rayft.models.difference import open_pair, pairs, whole
from rayft.models.heads import head_parameters
from rayft.models.load import ModelConfig
from rayft.squeeze.dense import DenseSqueeze

__all__ = ["Extraction", "Progress", "extract_full"]

Progress = Callable[[str, int, int], None]
"""Told after each module: its path, how many are done, of how many."""


@dataclass(frozen=True)
class Extraction:
    """An adapter made of a dense update, and what it does not hold."""

    artifact: AdapterArtifact
    """Squeezed: columns by singular value, the spectrum in its `meta`."""
    lost: Mapping[str, float]
    """Parameters that changed and are in no module of it, largest change first: name → ‖ΔW‖ / ‖W‖, infinite
    where the base has none."""
    unchanged: tuple[str, ...]
    """Target modules whose ΔW is exactly 0; the adapter leaves them out."""


def extract_full(
    base: ModelConfig,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: str | tuple[str, ...] = "all-linear",
    tuned_revision: str | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Extraction:
    """Make a LoRA of a full fine-tune.

    Args:
        base: the model that it started from; `task` and `num_labels` are those of the fine-tune, and the
            weights are read unquantised.
        tuned: folder, registered name or hub id of the fine-tuned model.
        rank: of each module; one whose min(O, I) is below gets that.
        energy: or the share of each module's ‖ΔW‖² to retain, in (0, 1].
        targets: as of a method: `all-linear`, a regular expression, or last name parts.
        tuned_revision: branch, tag or commit of a hub model.
        seed: decides the random numbers of the SVD.
        device: where it is computed.
        dtype: of the factors.
        progress: told after each module.

    Raises:
        SqueezeError: if not one of rank and energy is given, it is out of range, or nothing changed.
        TargetError: if targets match nothing.
        BaseMismatchError: if a tensor has another shape in the base.
        ModelError: if a checkpoint is missing, damaged, lacks a tensor, or holds NaN or Inf.
    """
    with open_pair(base, tuned, targets, tuned_revision) as pair:
        made = DenseSqueeze(pair.shapes, rank=rank, energy=energy, seed=seed, device=device, dtype=dtype)
        for done, name in enumerate(pair.shapes, 1):
            # No name for it here: the last one would live on while the next is read.
            made.add(name, pair.update(name))
            if progress:
                progress(name, done, len(pair.shapes))
        heads = {name: whole(pair.after.parameters[name]) for name in head_parameters(pair.skeleton)}
        inside = {f"{name}.weight" for name in pair.shapes} | heads.keys()
        lost = _lost(pair.skeleton, pair.before, pair.after, inside)
    meta = ArtifactMeta(
        method="full", task=base.task, base_model=base.name, base_fingerprint=pair.before.fingerprint(),
        transposed=any(map(pair.turned, pair.shapes)),
    )  # fmt: skip
    return Extraction(made.artifact(meta, heads), lost, tuple(made.unchanged))


def _lost(skeleton: Any, before: Checkpoint, after: Checkpoint, inside: set[str]) -> dict[str, float]:
    """Measure what changed outside the adapter, one block of rows in memory."""
    olds, news = {**before.others, **before.parameters}, {**after.others, **after.parameters}
    # An output layer that the base ties to its embedding, and the fine-tune does not, began as that.
    for output, embedding in (getattr(skeleton, "_tied_weights_keys", None) or {}).items():
        if output not in olds and embedding in olds:
            olds[output] = olds[embedding]
    changes = {}
    for name, new in news.items():
        if name in inside:
            continue
        old = olds.get(name)
        change = math.inf if old is None or old.shape != new.shape else _change(old, new)
        if change:
            changes[name] = change
    return dict(sorted(changes.items(), key=lambda item: -item[1]))


def _change(before: Stored, after: Stored) -> float:
    """Compute ‖W_tuned − W‖ / ‖W‖ in float64."""
    difference = norm = 0.0
    for _, old, new in pairs(before, after):
        difference += float((new.double() - old.double()).square().sum())
        norm += float(old.double().square().sum())
    if not difference:
        return 0.0
    return math.sqrt(difference / norm) if norm else math.inf

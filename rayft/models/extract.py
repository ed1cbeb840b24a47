"""A full fine-tune as a LoRA: the leading singular values of W_tuned − W_base, layer by layer.

    ΔW = W_tuned − W_base  (O × I, float32)        ΔW ≈ B·A,  B (O × k), A (k × I)

Both checkpoints stay on disk; in memory are one layer's ΔW and a block of rows of each checkpoint. What
else training changed (embeddings, norms, biases, the output layer, layers that are no targets) has no place
in a LoRA: it is measured, so that whoever uses the adapter knows what was lost. Heads travel whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import BaseMismatchError, ModelError
from rayft.models.checkpoint import Checkpoint, Stored, open_checkpoint
from rayft.models.heads import head_parameters
from rayft.models.load import ModelConfig, load_skeleton
from rayft.models.targets import linear_shapes, select
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
    skeleton = load_skeleton(base)
    other = base.model_copy(update={"name": str(tuned), "revision": tuned_revision})
    shapes = linear_shapes(skeleton)
    chosen = {name: shapes[name] for name in select(shapes, targets)}
    made = DenseSqueeze(chosen, rank=rank, energy=energy, seed=seed, device=device, dtype=dtype)
    with open_checkpoint(skeleton, base) as before, open_checkpoint(skeleton, other) as after:
        _check(skeleton, before, after, chosen)
        transposed = _add_all(made, skeleton, before, after, list(chosen), progress)
        heads = {name: _whole(after.parameters[name]) for name in head_parameters(skeleton)}
        inside = {f"{name}.weight" for name in chosen} | heads.keys()
        lost = _lost(skeleton, before, after, inside)
    meta = ArtifactMeta(
        method="full", task=base.task, base_model=base.name, base_fingerprint=before.fingerprint(),
        transposed=transposed,
    )  # fmt: skip
    return Extraction(made.artifact(meta, heads), lost, tuple(made.unchanged))


def _add_all(
    made: DenseSqueeze,
    skeleton: Any,
    before: Checkpoint,
    after: Checkpoint,
    chosen: list[str],
    progress: Progress | None,
) -> bool:
    """Squeeze one module after the other; says whether some are stored as inputs × outputs."""
    transposed = False
    for done, name in enumerate(chosen, 1):
        turned = type(skeleton.get_submodule(name)).__name__ == "Conv1D"
        transposed |= turned
        # No name for it here: the last one would live on while the next is read.
        made.add(name, _difference(before, after, f"{name}.weight", turned=turned))
        if progress:
            progress(name, done, len(chosen))
    return transposed


def _check(skeleton: Any, before: Checkpoint, after: Checkpoint, chosen: Mapping[str, object]) -> None:
    """Refuse what can't be subtracted before anything is read."""
    own = head_parameters(skeleton)
    for name in chosen:
        before.parameter(f"{name}.weight")
    for name, parameter in skeleton.named_parameters():
        shape = tuple(parameter.shape)
        if name in own:
            _check_head(after, name, shape)
            continue
        for checkpoint in (before, after):
            stored = checkpoint.parameters.get(name)
            if stored is not None and stored.shape != shape:
                raise BaseMismatchError(
                    f"{stored.where} is {_size(stored.shape)}, but {_size(shape)} in the model that "
                    f"{before.name} describes: the two are not of one kind; give the base that the fine-tune "
                    "started from"
                )
        if name in before.parameters:
            after.parameter(name)


def _check_head(after: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    stored = after.parameters.get(name)
    if stored is None:
        raise ModelError(
            f"{after.name} has no classification head {name}: was it trained for another task? Set model.task"
        )
    if stored.shape != shape:
        raise BaseMismatchError(
            f"{stored.where} is {_size(stored.shape)}, but {_size(shape)} for the classes given: set "
            "model.num_labels to those that it was trained for"
        )


def _pairs(before: Stored, after: Stored) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Read the same rows of both: first row, W, W_tuned."""
    for (start, old), (_, new) in zip(before.blocks(), after.blocks(), strict=True):
        yield start, old, new


def _difference(before: Checkpoint, after: Checkpoint, name: str, *, turned: bool) -> torch.Tensor:
    """Compute ΔW (O × I) in float32."""
    olds, news = before.parameters[name], after.parameters[name]
    delta = torch.empty(olds.shape, dtype=torch.float32)
    for start, old, new in _pairs(olds, news):
        torch.sub(new, old, out=delta[start : start + len(old)])
    return delta.t() if turned else delta


def _whole(stored: Stored) -> torch.Tensor:
    return torch.cat([block for _, block in stored.blocks()]).reshape(stored.shape)


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
    for _, old, new in _pairs(before, after):
        difference += float((new.double() - old.double()).square().sum())
        norm += float(old.double().square().sum())
    if not difference:
        return 0.0
    return math.sqrt(difference / norm) if norm else math.inf


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))

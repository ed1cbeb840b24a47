"""The difference of a tuned model and the base that it started from, read layer by layer from their files.

    ΔW = W_tuned − W_base  (O × I, float32)        W_base rounded to W_tuned's precision

Only the requested tensor and a block of rows of each checkpoint are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rayft.errors import BaseMismatchError, ModelError
from rayft.models.checkpoint import Checkpoint, Stored, open_checkpoint
from rayft.models.heads import head_parameters
from rayft.models.load import ModelConfig, load_skeleton
from rayft.models.targets import is_transposed, linear_shapes, select

__all__ = ["Pair", "open_pair", "pairs", "whole"]

HALF = {"F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names of types with fewer digits than float32."""


@dataclass(frozen=True)
class Pair:
    """The files of both models, and the layers that are compared."""

    skeleton: Any
    """The base on the meta device."""
    before: Checkpoint
    after: Checkpoint
    shapes: Mapping[str, tuple[int, int]]
    """Path of each chosen linear layer → (O, I)."""

    def turned(self, path: str) -> bool:
        """Whether a layer is stored as inputs × outputs."""
        return is_transposed(self.skeleton.get_submodule(path))

    def weight(self, path: str) -> torch.Tensor:
        """Read a layer's W_base (O × I) in float32.

        Raises:
            ModelError: if it holds NaN or Inf, or codes.
        """
        weight = whole(self.before.parameters[f"{path}.weight"])
        return weight.t() if self.turned(path) else weight

    def update(self, path: str) -> torch.Tensor:
        """Read a layer's ΔW (O × I) in float32.

        Raises:
            ModelError: if a weight holds NaN or Inf, or codes.
        """
        name = f"{path}.weight"
        olds, news = self.before.parameters[name], self.after.parameters[name]
        delta = torch.empty(olds.shape, dtype=torch.float32)
        for start, old, new in pairs(olds, news):
            torch.sub(new, old, out=delta[start : start + len(old)])
        return delta.t() if self.turned(path) else delta


@contextmanager
def open_pair(
    base: ModelConfig,
    tuned: str | Path,
    targets: str | tuple[str, ...] = "all-linear",
    tuned_revision: str | None = None,
) -> Iterator[Pair]:
    """Open a base and its full fine-tune, and check that one can be subtracted from the other.

    Args:
        base: the model that the fine-tune started from; `task` and `num_labels` are those of the fine-tune.
        tuned: folder, registered name or hub id of the fine-tuned model.
        targets: as in `method.targets`: `all-linear`, a regular expression, or last parts of names.
        tuned_revision: branch, tag or commit of a hub model.

    Raises:
        TargetError: if targets match nothing.
        BaseMismatchError: if a tensor has another shape in the base.
        ModelError: if a checkpoint is missing, damaged, or lacks a tensor.
    """
    skeleton = load_skeleton(base)
    other = base.model_copy(update={"name": str(tuned), "revision": tuned_revision})
    shapes = linear_shapes(skeleton)
    chosen = {name: shapes[name] for name in select(shapes, targets)}
    with open_checkpoint(skeleton, base) as before, open_checkpoint(skeleton, other) as after:
        _check(skeleton, before, after, chosen)
        yield Pair(skeleton, before, after, chosen)


def pairs(before: Stored, after: Stored) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the same rows of both, block by block and in float32: number of the first row, W, W_tuned.

    W is rounded to W_tuned's precision where that is lower. The training started from the rounded weights,
    and the rounding of all weights would be many times a small update.
    """
    coarse = HALF.get(after.kind) if before.kind not in HALF else None
    for (start, old), (_, new) in zip(before.blocks(), after.blocks(), strict=True):
        yield start, old if coarse is None else old.to(coarse).float(), new


def whole(stored: Stored) -> torch.Tensor:
    """Read all rows, in float32."""
    return torch.cat([block for _, block in stored.blocks()]).reshape(stored.shape)


def _check(skeleton: Any, before: Checkpoint, after: Checkpoint, chosen: Mapping[str, object]) -> None:
    """Refuse models that can't be subtracted, before any weight is read."""
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
                _check_vocabulary(skeleton, before, stored, shape)
                raise BaseMismatchError(
                    f"{stored.where} is {_size(stored.shape)}, but {_size(shape)} in the model that "
                    f"{before.name} describes: the two are not of one kind; give the base that the fine-tune "
                    "started from"
                )
        if name in before.parameters:
            after.parameter(name)


def _check_vocabulary(skeleton: Any, before: Checkpoint, stored: Stored, shape: tuple[int, ...]) -> None:
    """Refuse a fine-tune whose number of tokens was changed, with another error than for a wrong base."""
    vocabulary = getattr(skeleton.config.get_text_config(), "vocab_size", None)
    if vocabulary != shape[0] or stored.shape[1:] != shape[1:]:
        return
    raise BaseMismatchError(
        f"{stored.where} has {stored.shape[0]} tokens, and {before.name} has {shape[0]}: the fine-tune's "
        "vocabulary was changed, and a LoRA holds no rows of embeddings. Give the base with the same number "
        f"of tokens (load it, resize_token_embeddings({stored.shape[0]}), save it), and serve the adapter "
        "on that; or fine-tune without new tokens"
    )


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


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))

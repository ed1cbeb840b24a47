"""The loss on completions and classes; logits are computed only at the positions that have a target.

The output layer of a language model is its widest product (SmolLM2: 49,152 × 576), and the positions of a
prompt do not need it. A hook passes only the chosen positions to the output layer, so anything that a model
does to its logits afterwards (soft-capping, scaling) still applies. Where it does nothing, and the output
layer is frozen and has no hooks, a fused model (`rayft.models.fuse`) computes no logits: the hook keeps the
positions' hidden states, from which the loss is computed in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rayft.data.pack import AnyBatch, Batch, ClassBatch, ImageBatch
from rayft.kernels.linear_cross_entropy import linear_cross_entropy
from rayft.models.attention import mask_for
from rayft.models.fuse import FusedHead, is_called

__all__ = ["batch_loss", "class_logits", "mean_loss", "target_losses", "targets_of"]


def batch_loss(
    model: nn.Module, batch: AnyBatch, forward: Callable[..., Any] | None = None
) -> tuple[torch.Tensor, int]:
    """Return the summed negative log-likelihood (nats) of a batch's targets, and their number.

    Args:
        model: a causal language model, a sequence classifier for a `ClassBatch`, or an image classifier
            for an `ImageBatch`, whose pixels are cast to the model's dtype.
        batch: on the model's device.
        forward: called instead of the model, for an engine that wraps it.
    """
    loss = _cross_entropy(model, batch, forward, "sum")
    return loss, len(targets_of(batch))


def target_losses(
    model: nn.Module, batch: AnyBatch, forward: Callable[..., Any] | None = None
) -> torch.Tensor:
    """Return the negative log-likelihood of each target of a batch: (targets,), nats, float32.

    The order is that of the batch's targets or labels. The arguments are those of `batch_loss`.
    """
    return _cross_entropy(model, batch, forward, "none")


@torch.inference_mode()
def mean_loss(model: nn.Module, batches: Iterable[AnyBatch]) -> tuple[float, int]:
    """Return the summed loss (nats) and the number of targets of batches, without gradients."""
    total, count = 0.0, 0
    for batch in batches:
        loss, targets = batch_loss(model, batch)
        total += float(loss)
        count += targets
    return total, count


def class_logits(
    model: nn.Module, batch: ClassBatch | ImageBatch, forward: Callable[..., Any] | None = None
) -> torch.Tensor:
    """Return the logits (B, classes) of a classifier for a batch on its device."""
    call = forward or model
    if isinstance(batch, ImageBatch):
        dtype: torch.dtype = model.dtype  # type: ignore[assignment]
        return call(pixel_values=batch.pixel_values.to(dtype)).logits  # type: ignore[no-any-return]
    logits: torch.Tensor = call(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits


def targets_of(batch: AnyBatch) -> torch.Tensor:
    """Return the targets of a batch, tokens or classes: (targets,) int64."""
    return batch.labels if isinstance(batch, ClassBatch) else batch.targets


def _cross_entropy(
    model: nn.Module, batch: AnyBatch, forward: Callable[..., Any] | None, reduction: str
) -> torch.Tensor:
    call = forward or model
    if isinstance(batch, Batch):
        head = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, FusedHead) and not head.weight.requires_grad and not is_called(head):
            losses = _fused_losses(model, head, batch, call)
            return losses.sum() if reduction == "sum" else losses
        logits = _logits(model, head, batch, call, lambda hidden_ND: hidden_ND)
    else:
        logits = class_logits(model, batch, call)
    return functional.cross_entropy(logits.float(), targets_of(batch), reduction=reduction)


def _fused_losses(model: nn.Module, head: Any, batch: Batch, call: Callable[..., Any]) -> torch.Tensor:
    chosen = []

    def keep(hidden_ND: torch.Tensor) -> torch.Tensor:
        chosen.append(hidden_ND)
        return hidden_ND[:0]

    _logits(model, head, batch, call, keep)
    return linear_cross_entropy(chosen[0], head.weight, batch.targets)


def _logits(
    model: nn.Module,
    head: nn.Module,
    batch: Batch,
    call: Callable[..., Any],
    pick: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the logits of what `pick` returns; it is given the hidden states (N, D) at the completions."""

    def select(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BTD = args[0]
        # Unlike that of an index, its backward pass sorts nothing.
        chosen = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, batch.completion_index)
        return (pick(chosen).unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        output = call(
            input_ids=batch.input_ids,
            attention_mask=mask_for(model, batch.offsets, *batch.input_ids.shape),
            position_ids=batch.position_ids,
            use_cache=False,
        )
    finally:
        handle.remove()
    return output.logits[0]  # type: ignore[no-any-return]

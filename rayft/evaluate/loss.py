"""Loss on the completion, with logits only where there is something to predict.

The output layer of a language model is its widest product (SmolLM2: 49,152 × 576); a prompt's
positions need none of it. A hook hands the output layer just the chosen positions, so whatever a
model does to its logits afterwards (soft-capping, scaling) still applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rayft.data.pack import AnyBatch, Batch, ClassBatch, ImageBatch

__all__ = ["batch_loss", "class_logits", "mean_loss", "target_losses", "targets_of"]


def batch_loss(
    model: nn.Module, batch: AnyBatch, forward: Callable[..., Any] | None = None
) -> tuple[torch.Tensor, int]:
    """Sum the negative log-likelihood (nats) of a batch's targets; give it with their number.

    Args:
        model: a causal language model, a sequence classifier for a `ClassBatch`, or an image classifier
            for an `ImageBatch`, whose pixels are cast to the model's dtype.
        batch: on the model's device.
        forward: what to call instead of the model (an engine that wraps it).
    """
    loss = _cross_entropy(model, batch, forward, "sum")
    return loss, len(targets_of(batch))


def target_losses(
    model: nn.Module, batch: AnyBatch, forward: Callable[..., Any] | None = None
) -> torch.Tensor:
    """Give the negative log-likelihood of each target of a batch: (targets,), nats, float32.

    They come in the order of the batch's targets or labels; arguments as for `batch_loss`.
    """
    return _cross_entropy(model, batch, forward, "none")


@torch.inference_mode()
def mean_loss(model: nn.Module, batches: Iterable[AnyBatch]) -> tuple[float, int]:
    """Sum loss and targets over batches without gradients: (sum in nats, number of targets)."""
    total, count = 0.0, 0
    for batch in batches:
        loss, targets = batch_loss(model, batch)
        total += float(loss)
        count += targets
    return total, count


def class_logits(
    model: nn.Module, batch: ClassBatch | ImageBatch, forward: Callable[..., Any] | None = None
) -> torch.Tensor:
    """Give the logits (B, classes) of a classifier for a batch on its device."""
    call = forward or model
    if isinstance(batch, ImageBatch):
        dtype: torch.dtype = model.dtype  # type: ignore[assignment]
        return call(pixel_values=batch.pixel_values.to(dtype)).logits  # type: ignore[no-any-return]
    logits: torch.Tensor = call(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits


def targets_of(batch: AnyBatch) -> torch.Tensor:
    """Give what a batch's losses are of: (targets,) int64, tokens or classes."""
    return batch.labels if isinstance(batch, ClassBatch) else batch.targets


def _cross_entropy(
    model: nn.Module, batch: AnyBatch, forward: Callable[..., Any] | None, reduction: str
) -> torch.Tensor:
    call = forward or model
    if isinstance(batch, Batch):
        logits = _completion_logits(model, batch, call)
    else:
        logits = class_logits(model, batch, call)
    return functional.cross_entropy(logits.float(), targets_of(batch), reduction=reduction)


def _completion_logits(model: nn.Module, batch: Batch, call: Callable[..., Any]) -> torch.Tensor:
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BTD = args[0]
        chosen = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[batch.completion_index]
        return (chosen.unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        output = call(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
    finally:
        handle.remove()
    return output.logits[0]  # type: ignore[no-any-return]

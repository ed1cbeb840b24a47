"""The loss of an output layer's logits, without all logits in memory at the same time.

Semantics:
    l = h Wᵀ                                   (N × V), in h's dtype
    loss_n = logsumexp(l_n) − l_n[target_n]    in float32
    ∂loss_n/∂h_n = (softmax(l_n) − onehot(target_n)) W

The gradient of a target's loss reaches its own row of h alone. So it is computed beside the loss, chunk by
chunk, and kept in h's dtype (N × D); the backward pass multiplies each row by the gradient of its loss. The
logits in float32 (N × V) and their gradient never exist as a whole. W is frozen.

Shapes: N targets, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rayft.kernels.fused import run

__all__ = ["linear_cross_entropy", "reference"]

ROWS = 2048
"""Most rows of a chunk."""
LOGITS = 2**27
"""Most logits of a chunk, in which two matrices of this size exist (in bfloat16, 256 MiB each)."""


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return each target's negative log-likelihood: (N,) float32, nats. It can be differentiated once.

    Args:
        hidden: (N, D).
        weight: (V, D); it gets no gradient.
        targets: (N,) int64.
    """
    losses: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return losses


def reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute what `linear_cross_entropy` does from all logits at the same time."""
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits.float(), targets, reduction="none")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        learns = ctx.needs_input_grad[0]
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if learns else None
        rows = max(1, min(ROWS, LOGITS // len(weight)))
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = hidden[chunk] @ weight.t()
            if gradient is None:
                losses[chunk] = run(_losses, logits, targets[chunk, None])
                continue
            losses[chunk], slope = run(_losses_and_slope, logits, targets[chunk, None])
            torch.mm(slope, weight, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[:, None]).to(gradient.dtype), None, None


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the losses (N,) of targets (N, 1)."""
    wide = logits.float()
    return wide.logsumexp(-1) - wide.gather(1, targets)[:, 0]


def _losses_and_slope(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses (N,), and their gradients in the logits (N, V), in the logits' dtype."""
    wide = logits.float()
    total = wide.logsumexp(-1)
    chosen = torch.arange(wide.shape[1], device=wide.device) == targets
    slope = torch.exp(wide - total[:, None]) - chosen.float()
    return total - wide.gather(1, targets)[:, 0], slope.to(logits.dtype)

"""A linear layer with a low-rank update of its output, forward and backward.

Semantics:

    forward:    h = x @ A.T          or  x[:, A] where A is a list of columns
                y = x @ W.T + bias + s * (h @ B.T)                              -> y, h
    backward:   q = s * (g @ B)
                db = s * (g.T @ h)                   # h belongs to the last R columns of B
                grad_x = g @ W + q @ A   or   g @ W with q added into its columns A
                                                                                -> grad_x, q, db

The arithmetic of the update is negligible, but every pass over y, g, x or grad_x costs its bytes, and every
launch some microseconds. So on a GPU (Triton, 16-bit, K ≤ 64):

- one kernel writes h and the update first, and the base's product accumulates onto it (beta = 1), which
  hides the read of y behind the arithmetic. Adding the update afterwards would cost a read and a write;
- one kernel reads g once for q and db. A second one adds up the parts of their sums in a fixed order, so
  that each run gives the same bits, and writes q A, onto which the base's product accumulates.

In all other cases plain products compute it. Measured for all linears of a 1.0 B Llama shape, rank 16,
8,192 tokens, on an H200: q and db take 2.6 ms in one pass and 5.3 ms in two; the update of y takes 3.5 ms
when it is written first and 5.6 ms when it is added.

Shapes: N tokens, I inputs, O outputs, K rank of the update, R ≤ K rank of its part that trains.
x (N × I), W (O × I), A (K × I) or (K,) int64, B (O × K), y and g (N × O), q (N × K), h (N × K).
"""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["MAX_RANK", "backward", "forward", "reference_backward", "reference_forward"]

MAX_RANK = 64
"""The largest rank of the kernels: above it the tiles don't fit on the chip, and plain products are fast."""


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (y, h); W may have any strides, and columns may repeat."""
    if _fast(x, b):
        from rayft.kernels.low_rank_linear_triton import update

        y, h = update(x, bias, a, b, scale)
        return y.addmm_(x, weight.t()), h
    return reference_forward(x, weight, bias, a, b, scale)


def backward(
    g: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    h: torch.Tensor,
    scale: float,
    *,
    distinct: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Compute (grad_x, q, db); q is None where A is a list of columns.

    Args:
        g: dL/dy.
        weight: W.
        a: A.
        b: B.
        h: (N × R) from forward: its last R columns where the others belong to frozen links.
        scale: s.
        distinct: whether the columns in A are distinct.
    """
    if not _fast(g, b) or not distinct:
        return reference_backward(g, weight, a, b, h, scale)
    from rayft.kernels.low_rank_linear_triton import gradients

    if a.ndim == 1:
        grad_x = g @ weight
        _, _, db = gradients(g, a, b, h, scale, grad_x)
        return grad_x, None, db
    grad_x, q, db = gradients(g, a, b, h, scale)
    return grad_x.addmm_(g, weight), q, db


def reference_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute forward with plain products."""
    h = x.index_select(1, a) if a.ndim == 1 else x @ a.t()
    return functional.linear(x, weight, bias).addmm_(h, b.t(), alpha=scale), h


def reference_backward(
    g: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, h: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Compute backward with plain products; the gradients of a column that is in A twice add up."""
    db = (g.t() @ h).mul_(scale)
    if a.ndim == 1:
        return (g @ weight).index_add_(1, a, g @ b, alpha=scale), None, db
    q = (g @ b).mul_(scale)
    return (g @ weight).addmm_(q, a), q, db


def _fast(x: torch.Tensor, b: torch.Tensor) -> bool:
    small = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and small and b.shape[1] <= MAX_RANK and x.numel() > 0

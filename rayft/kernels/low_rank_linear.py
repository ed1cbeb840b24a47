"""A linear layer with a low-rank update of its output, forward and backward.

Semantics:

    forward:    h = x @ A.T          or  x[:, A] where A is a list of columns
                y = x @ W.T + bias + s * (h @ B.T)                              -> y, h
    backward:   q = s * (g @ B)
                db = s * (g.T @ h)                   # h belongs to the last R columns of B
                grad_x = g @ W + q @ A   or   g @ W with q added into its columns A
                                                                                -> grad_x, q, db

The update costs no arithmetic to speak of, but every pass over y, g, x or grad_x costs its bytes, and
every launch some microseconds. So on a GPU (Triton, 16-bit, K ≤ 64):

- the update is written first, with h, by one kernel, and the base's product accumulates onto it
  (beta = 1): its read of y hides behind the arithmetic. Added afterwards it costs a read and a write;
- one kernel reads g once for q and db; parts of their sums are added up by a second one in a fixed
  order, so each run gives the same bits; that one also writes q A for the product to accumulate onto.

Elsewhere plain products do it. All linears of a 1.0 B Llama shape, rank 16, 8,192 tokens, on an H200:
q and db take 2.6 ms in one pass and 5.3 in two; the update of y 3.5 ms written first and 5.6 added.

Shapes: N tokens, I inputs, O outputs, K rank of the update, R ≤ K rank of what trains of it.
x (N × I), W (O × I), A (K × I) or (K,) int64, B (O × K), y and g (N × O), q (N × K), h (N × K).
"""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["MAX_RANK", "backward", "forward", "reference_backward", "reference_forward"]

MAX_RANK = 64
"""Above it the tiles no longer fit on the chip, and plain products do well by themselves."""


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (y, h); W may have any strides, columns may repeat."""
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
        h: (N × R), as forward gave it, the last R columns of it where the others are frozen.
        scale: s.
        distinct: whether no column stands in A twice.
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
    """Compute forward by plain products."""
    h = x.index_select(1, a) if a.ndim == 1 else x @ a.t()
    return functional.linear(x, weight, bias).addmm_(h, b.t(), alpha=scale), h


def reference_backward(
    g: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, h: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Compute backward by plain products; a column that stands in A twice gets both shares."""
    db = (g.t() @ h).mul_(scale)
    if a.ndim == 1:
        return (g @ weight).index_add_(1, a, g @ b, alpha=scale), None, db
    q = (g @ b).mul_(scale)
    return (g @ weight).addmm_(q, a), q, db


def _fast(x: torch.Tensor, b: torch.Tensor) -> bool:
    small = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and small and b.shape[1] <= MAX_RANK and x.numel() > 0

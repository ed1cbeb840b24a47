"""A linear layer for the packed rows of several trials, each with its own low-rank terms.

Semantics:

    forward:    y = x @ W.T + bias
                for each term:
                    h = x[rows] @ A.T      or  x[rows][:, columns]
                    y[rows] += s * (h @ B.T)
    backward:   grad_x = g @ W
                for each term:
                    q = s * (g[rows] @ B)
                    db = s * (g[rows].T @ h)            # where B trains
                    da = q.T @ x[rows]                  # where A trains
                    grad_x[rows] += q @ A  or  q added into its columns

One product with the base's weight serves all rows, and each term is multiplied at its own rank. Rows without
a term get the base alone. Rows of one trial are never multiplied with those of another, not even by zero:
a trial whose numbers are NaN or infinite leaves the others alone.

On a GPU (Triton, 16-bit) few launches compute all terms of a layer:

- one kernel writes every row's update (zeros where there is no term), and the base's product accumulates
  onto it, which hides the read of y behind the arithmetic;
- one kernel reads g once for q and db of all terms. A second one adds up the parts of their sums in a fixed
  order, so that each run gives the same bits, and writes q A, onto which the base's product accumulates; or,
  if most rows select inputs, adds to the product that is there. A third one computes da.

In all other cases plain products compute it, term by term.

Shapes: N tokens, I inputs, O outputs, R the rank of one term. x (N × I), W (O × I), A (R × I), columns (R,),
B (O × R), y and g (N × O), h and q (rows × R).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rayft.kernels.grouped_linear_table import Table
from rayft.numerics import reshaped

__all__ = ["Plan", "Term", "grouped_linear", "reference_backward", "reference_forward"]


@dataclass(frozen=True, eq=False)
class Term:
    """A low-rank term s·B·A that is added for the tokens of one slot.

    B and A train if they require gradients. Several terms may have the same rows: of a chain, the past links
    are one term without gradients, and the link that trains is another.
    """

    rows: slice
    """The slot's tokens: `slice(first, end)`."""
    b: torch.Tensor
    """B (O × R)."""
    scale: float
    """The factor s."""
    a: torch.Tensor | None = None
    """A (R × I)."""
    columns: torch.Tensor | None = None
    """Selected inputs (R,), int64, instead of A."""
    distinct: bool = True
    """Whether the columns are distinct. The contributions of a column that is repeated add up."""

    def __post_init__(self) -> None:
        assert (self.a is None) != (self.columns is None), "a term has either A or columns"
        rank = self.b.shape[1]
        assert self.a is None or self.a.shape[0] == rank, f"A has {self.a.shape[0]} rows, B rank {rank}"
        assert self.columns is None or self.columns.shape == (rank,), f"not {rank} columns"
        assert self.rows.step in (None, 1), "the rows of a term are contiguous"
        assert 0 <= self.rows.start <= self.rows.stop, f"{self.rows} is no range of rows"

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """What trains of it: B, A, both or nothing."""
        return tuple(tensor for tensor in (self.b, self.a) if tensor is not None and tensor.requires_grad)


class Plan:
    """The terms of one layer for one division of the rows among slots, to be used step after step.

    What trains is decided when the plan is made. On a GPU it keeps a table on the device that says where each
    term's factors and rows are. The first call of `grouped_linear` for a number of tokens writes the table,
    and so does a call after a factor's memory has moved. Neither may happen while a CUDA graph is captured,
    so make one call before. A captured graph reads the table that the plan had then, so keep the plan, and
    call it for no other number of tokens, as long as the graph is replayed.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        """Take the terms, sorted by their rows; rows of two terms are the same or disjoint."""
        self.terms = tuple(terms)
        for one, other in pairwise(self.terms):
            same = (one.rows.start, one.rows.stop) == (other.rows.start, other.rows.stop)
            assert same or one.rows.stop <= other.rows.start, f"{one.rows} and {other.rows} overlap"
        self.parameters = tuple(tensor for term in self.terms for tensor in term.parameters)
        """What trains, in the order of the terms, B before A."""
        self.needs_x = any(term.a is not None and term.a.requires_grad for term in self.terms)
        """Whether the backward pass reads x, because an A trains."""
        factors = [(term.b, term.a, term.columns) for term in self.terms]
        self._factors = [factor for each in factors for factor in each if factor is not None]
        self._table: Table | None = None
        self._key: tuple[object, ...] = ()

    def table(self, x: torch.Tensor, outputs: int) -> Table:
        """Return the table that the kernels read, written anew if it is not the one for these tokens."""
        places = [factor.data_ptr() for factor in self._factors]
        key = (x.device, x.dtype, *x.shape, outputs, *places)
        if self._table is None or key != self._key:
            capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
            assert not capturing, "the first call for these tokens and factors belongs before the capture"
            self._table, self._key = Table(self.terms, x.shape[0], x.shape[1], outputs, x), key
        return self._table


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: Plan | Sequence[Term]
) -> torch.Tensor:
    """Compute the layer's output (…, O), with gradients for x and for each B and A that requires them.

    Args:
        x: input (…, I); its tokens, in their order, are the N rows that terms speak of.
        weight: W (O × I), frozen; it may have any strides.
        bias: (O,), frozen.
        terms: the terms in the order of their rows, or a plan of them. Make a plan once where the same terms
            are used again.
    """
    plan = terms if isinstance(terms, Plan) else Plan(terms)
    y: torch.Tensor = GroupedLinear.apply(x, weight, bias, plan, *plan.parameters)  # type: ignore[no-untyped-call]
    return y


class GroupedLinear(torch.autograd.Function):
    """Base and all terms in one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        plan: Plan,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """Compute y; x is saved only where an A trains, and h only of terms that train."""
        x_NI = x.reshape(-1, x.shape[-1])
        ctx.plan, ctx.x_shape, ctx.table = plan, x.shape, None
        if _fast(x):
            from rayft.kernels import grouped_linear_triton as kernels

            ctx.table = plan.table(x_NI, weight.shape[0])
            y_NO, h = kernels.forward(x_NI, weight, bias, ctx.table)
            kept = [h]
        else:
            y_NO, kept = reference_forward(x_NI, weight, bias, plan)
        # The parameters are saved so that torch refuses a backward pass after they have changed.
        ctx.save_for_backward(x_NI if plan.needs_x else None, weight, *kept, *parameters)
        return reshaped(y_NO, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x and of what trains."""
        x_NI, weight, *kept = ctx.saved_tensors
        g_NO, needs_grad_x = grads[0].reshape(-1, grads[0].shape[-1]), ctx.needs_input_grad[0]
        if ctx.table is None:
            grad_x, found = reference_backward(g_NO, x_NI, weight, ctx.plan, kept, needs_grad_x=needs_grad_x)
        else:
            from rayft.kernels import grouped_linear_triton as kernels

            grad_x, found = kernels.backward(
                g_NO, x_NI, weight, ctx.table, kept[0], needs_grad_x=needs_grad_x
            )
        return None if grad_x is None else grad_x.view(ctx.x_shape), None, None, None, *found


def reference_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: Plan
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute y, and h of each term whose B trains, with plain products."""
    y, kept = functional.linear(x, weight, bias), []
    for term in plan.terms:
        part = x[term.rows]
        h = part.index_select(1, term.columns) if term.a is None else part @ term.a.t()  # type: ignore[arg-type]
        y[term.rows].addmm_(h, term.b.t(), alpha=term.scale)
        if term.b.requires_grad:
            kept.append(h)
    return y, kept


def reference_backward(
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    plan: Plan,
    kept: Sequence[torch.Tensor],
    *,
    needs_grad_x: bool = True,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Compute grad_x, if it is needed, and the gradients of `plan.parameters` with plain products.

    Args:
        g: dL/dy.
        x: the input, where an A trains.
        weight: W.
        plan: the terms.
        kept: h of each term whose B trains.
        needs_grad_x: whether grad_x is needed.
    """
    grad_x = g @ weight if needs_grad_x else None
    found, inner = [], iter(kept)
    for term in plan.terms:
        part = g[term.rows]
        if term.b.requires_grad:
            found.append((part.t() @ next(inner)).mul_(term.scale))
        trains_a = term.a is not None and term.a.requires_grad
        if grad_x is None and not trains_a:
            continue
        q = (part @ term.b).mul_(term.scale)
        if trains_a:
            assert x is not None
            found.append(q.t() @ x[term.rows])
        if grad_x is not None and term.a is not None:
            grad_x[term.rows].addmm_(q, term.a)
        elif grad_x is not None:
            assert term.columns is not None
            grad_x[term.rows].index_add_(1, term.columns, q)
    return grad_x, found


def _fast(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.numel() > 0

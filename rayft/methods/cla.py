"""cLA, cheap LoRA. Cadenhead et al. 2026, arXiv:2606.13767, section on sparse selectors.

    ΔW = s·B·A        A = [I_R | 0] (R × I): frozen        B (O × R): 0, trained
Trainable: R·O a layer.   Export to LoRA: exact (A written out as a dense selector).

A is stored as the list of the inputs that it selects (the first R), not as a matrix: forward gathers
x[…, columns]. Backward, with g = dL/dy (N × O), x_S (N × R) the gathered inputs:
    dB = s·gᵀ x_S        dx = g W, with s·g B added into the selected columns
Saved for backward: x_S, R numbers a token, and the weights, but not x. The stacked links of a chain
gather all their columns at once; the contributions of a column that two links select add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from rayft.kernels import low_rank_linear as kernel
from rayft.kernels.grouped_linear import Term
from rayft.methods.asym import trained
from rayft.methods.base import (
    Adapter,
    AdapterLinear,
    LayerShape,
    LoraFactors,
    Method,
    MethodConfig,
    unaliased,
)
from rayft.methods.lora import zeros
from rayft.numerics import reshaped

__all__ = ["METHOD", "SelectorAdapter", "any_columns"]


class SelectorFunction(torch.autograd.Function):
    """Base and gathered update in one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        columns: torch.Tensor,
        b: torch.Tensor,
        past_b: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Compute y = x Wᵀ + bias + s x[…, columns] [B_past B]ᵀ."""
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO, xs_NK = kernel.forward(x_NI, weight, bias, columns, _stack(past_b, b), scale)
        xs_NR = xs_NK if past_b is None else xs_NK[:, -b.shape[1] :].contiguous()
        ctx.save_for_backward(xs_NR, weight, columns, b, past_b)
        ctx.scale = scale
        ctx.x_shape = x.shape
        return reshaped(y_NO, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x and B; those of a column that is selected twice add up."""
        xs_NR, weight, columns, b, past_b = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, grads[0].shape[-1])
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, (g_NO.t() @ xs_NR).mul_(ctx.scale), None, None
        # The last window of a chain may wrap onto columns of the first one.
        distinct = past_b is None or weight.shape[1] % b.shape[1] == 0
        grad_x, _, grad_b = kernel.backward(
            g_NO, weight, columns, _stack(past_b, b), xs_NR, ctx.scale, distinct=distinct
        )
        return grad_x.view(ctx.x_shape), None, None, None, grad_b, None, None


def _stack(past_b: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
    return b if past_b is None else torch.cat([past_b, b], 1)


class SelectorAdapter(Adapter):
    """A trainable B on the inputs that a frozen index vector selects."""

    columns: torch.Tensor
    past_B: torch.Tensor | None

    def __init__(self, columns: torch.Tensor, b: torch.Tensor, inputs: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.lora_B = nn.Parameter(b)
        self.register_buffer("past_B", None)
        self.inputs = inputs
        self.scale = scale

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Compute base and update together, or, if `weight` is None, the update, which can drop inputs."""
        if weight is None:
            return self.scale * self._update(x, dropout)
        return SelectorFunction.apply(  # type: ignore[no-any-return,no-untyped-call]
            x, unaliased(weight), bias, self.columns, self.lora_B, self.past_B, self.scale
        )

    def _update(self, x: torch.Tensor, dropout: float) -> torch.Tensor:
        """Compute x ΔWᵀ/s; past links are a product of their own, whose inputs are not saved or dropped."""
        rank = self.lora_B.shape[1]
        xs = nn.functional.dropout(x.index_select(-1, self.columns[-rank:]), dropout)
        y = nn.functional.linear(xs, self.lora_B)
        if self.past_B is None:
            return y
        return y + nn.functional.linear(x.index_select(-1, self.columns[:-rank]), self.past_B)

    def update(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        """Compute the update; dropout is drawn for the gathered inputs only."""
        # Called as a module, because ZeRO-3's hooks on a module gather B.
        return self(x, None, None, dropout)  # type: ignore[no-any-return]

    def terms(self, rows: slice) -> list[Term]:
        """Return the link that trains as a term, after one of the past links."""
        rank = self.lora_B.shape[1]
        now = Term(rows, self.lora_B, self.scale, columns=self.columns[-rank:])
        if self.past_B is None:
            return [now]
        # The last window of a chain may wrap onto columns of the first one.
        distinct = self.inputs % rank == 0
        past = Term(rows, self.past_B, self.scale, columns=self.columns[:-rank], distinct=distinct)
        return [past, now]

    def to_lora(self) -> LoraFactors:
        """Return the factors, all links stacked, with the selector as a matrix: A[j, columns[j]] = 1."""
        b = _stack(self.past_B, self.lora_B.detach())
        a = torch.zeros(b.shape[1], self.inputs, dtype=b.dtype, device=b.device)
        a[torch.arange(b.shape[1], device=b.device), self.columns] = 1
        return LoraFactors(a, b, self.scale, columns=tuple(self.columns.tolist()))

    def begin_link(self, columns: torch.Tensor) -> None:
        """Move the trained link to the past ones and start the next from other columns (R) and B = 0."""
        self.past_B = _stack(self.past_B, self.lora_B.detach()).clone()
        self.columns = torch.cat([self.columns, columns.to(self.columns)])
        self.lora_B = nn.Parameter(torch.zeros_like(self.lora_B))


def any_columns(shape: LayerShape) -> int:
    """Return the largest rank: I, where each input is selected once."""
    return shape.inputs


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> SelectorAdapter:
    """Select the first R inputs and set B to 0; nothing is random."""
    b = zeros(layer, config.rank)
    columns = torch.arange(config.rank, device=b.device)
    return SelectorAdapter(columns, b, layer.in_features, config.scale)


METHOD = Method(name="cla", build=build, trained=trained, max_rank=any_columns)

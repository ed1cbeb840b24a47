"""cLA, cheap LoRA. Cadenhead et al. 2026, arXiv:2606.13767, section on sparse selectors.

    ΔW = s·B·A        A = [I_R | 0] (R × I): frozen        B (O × R): 0, trained
Trainable: R·O a layer.   Export to LoRA: exact (A written out as a dense selector).

A is never a matrix here, it is the list of the inputs it selects (the first R): forward gathers
x[…, columns]. Backward, with g = dL/dy (N × O), x_S (N × R) the gathered inputs:
    dB = s·gᵀ x_S        dx = g W, with s·g B added into the selected columns
Saved for backward: x_S, R numbers a token, and the weights, but not x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from rayft.methods.base import Adapter, AdapterLinear, LayerShape, LoraFactors, Method, MethodConfig

__all__ = ["METHOD", "SelectorAdapter"]


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
        scale: float,
    ) -> torch.Tensor:
        """Compute y = x Wᵀ + bias + s x[…, columns] Bᵀ."""
        x_NI = x.reshape(-1, x.shape[-1])
        xs_NR = x_NI.index_select(1, columns)
        y_NO = nn.functional.linear(x_NI, weight, bias)
        y_NO.addmm_(xs_NR, b.t(), alpha=scale)
        ctx.save_for_backward(xs_NR, weight, columns, b)
        ctx.scale = scale
        ctx.x_shape = x.shape
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Give the gradients of x and B; a column selected twice gets both shares."""
        xs_NR, weight, columns, b = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, grads[0].shape[-1])
        grad_b = (g_NO.t() @ xs_NR).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = g_NO @ weight
            grad_x.index_add_(1, columns, g_NO @ b, alpha=ctx.scale)
            grad_x = grad_x.view(ctx.x_shape)
        return grad_x, None, None, None, grad_b, None


class SelectorAdapter(Adapter):
    """A trainable B on inputs chosen by a frozen index vector."""

    columns: torch.Tensor

    def __init__(self, columns: torch.Tensor, b: torch.Tensor, inputs: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.lora_B = nn.Parameter(b)
        self.inputs = inputs
        self.scale = scale

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute base and update together."""
        return SelectorFunction.apply(x, weight, bias, self.columns, self.lora_B, self.scale)  # type: ignore[no-any-return,no-untyped-call]

    def to_lora(self) -> LoraFactors:
        """Write the selector out as A[j, columns[j]] = 1."""
        b = self.lora_B.detach()
        a = torch.zeros(b.shape[1], self.inputs, dtype=b.dtype, device=b.device)
        a[torch.arange(b.shape[1], device=b.device), self.columns] = 1
        return LoraFactors(a, b, self.scale, columns=tuple(self.columns.tolist()))


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> SelectorAdapter:
    """Select the first R inputs and set B to 0 (nothing here is random)."""
    like = layer.weight
    columns = torch.arange(config.rank, device=like.device)
    b = torch.zeros(layer.out_features, config.rank, dtype=like.dtype, device=like.device)
    return SelectorAdapter(columns, b, layer.in_features, config.scale)


def trained(shape: LayerShape, rank: int) -> int:
    """Count R·O."""
    return rank * shape.outputs


METHOD = Method(name="cla", build=build, trained=trained, max_rank=lambda shape: shape.inputs)

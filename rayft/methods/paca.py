"""PaCA, partial connection adaptation. Woo et al. 2025, arXiv:2503.01905.

    P = W[:, S]        S: R distinct random inputs        P (O × R): starts as W0[:, S], trained in place
    ΔW[:, S] = P − W0[:, S]
Trainable: R·O a layer.   Export to LoRA: B = (P − W0[:, S])/s in float32, A the selector of S.

The columns are the layer's own, so the layer computes one product, y = x Wᵀ. Backward, with
g = dL/dy (N × O) and x_S (N × R) the gathered inputs:
    dP = gᵀ x_S        dx = g W
Saved for backward: x_S, R numbers a token, and the weights. P is a parameter of its own, of which the
optimizer keeps a float32 master. It is written into W before each product, and weight decay does not
apply to it. The function is rcla's with the learning rate scaled by s. A base that does not hold W whole
is refused: a quantised one, and any base under ZeRO-3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from rayft.errors import MethodError
from rayft.kernels.columns import gather_columns, write_columns
from rayft.methods.asym import trained
from rayft.methods.base import Adapter, AdapterLinear, InPlace, LoraFactors, MethodConfig
from rayft.methods.cla import any_columns
from rayft.methods.rcla import random_columns

__all__ = ["METHOD", "ColumnAdapter"]


class ColumnFunction(torch.autograd.Function):
    """The base's product, with a gradient for the columns of W that are trained."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        columns: torch.Tensor,
        p: torch.Tensor,
    ) -> torch.Tensor:
        """Compute y = x Wᵀ + bias, where W already holds P."""
        x_NI = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(gather_columns(x_NI, columns), weight)
        ctx.x_shape = x.shape
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x and P."""
        xs_NR, weight = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, grads[0].shape[-1])
        grad_p = g_NO.t() @ xs_NR if ctx.needs_input_grad[4] else None
        grad_x = (g_NO @ weight).view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, grad_p


class ColumnAdapter(Adapter):
    """Trainable columns of the layer's own weight; `start` holds their values before training."""

    columns: torch.Tensor
    start: torch.Tensor

    def __init__(self, columns: torch.Tensor, start: torch.Tensor, inputs: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.register_buffer("start", start)
        self.trained_columns = nn.Parameter(start.clone())
        self.inputs = inputs
        self.scale = scale

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Write P into the weight, which is this layer's own, and compute with it."""
        if weight is None:
            raise MethodError("paca trains the base's own weights; it can't run beside them")
        # Through `data`: after a write that autograd sees, the backward pass of another use of W fails.
        write_columns(weight.data, self.columns, self.trained_columns.detach())
        return ColumnFunction.apply(x, weight, bias, self.columns, self.trained_columns)  # type: ignore[no-any-return,no-untyped-call]

    def to_lora(self) -> LoraFactors:
        """Return B = (P − W0[:, S])/s in float32, so that W0 + s·B·A rounds to the trained 16-bit weights."""
        wide = torch.promote_types(self.start.dtype, torch.float32)
        b = (self.trained_columns.detach().to(wide) - self.start.to(wide)) / self.scale
        a = torch.zeros(b.shape[1], self.inputs, dtype=wide, device=b.device)
        a[torch.arange(b.shape[1], device=b.device), self.columns] = 1
        return LoraFactors(a, b, self.scale, columns=tuple(self.columns.tolist()))

    def restore(self, weight: torch.Tensor) -> None:
        """Write W0[:, S] back."""
        write_columns(weight.data, self.columns, self.start)


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> ColumnAdapter:
    """Choose R random columns and start from their values."""
    columns = random_columns(layer, config.rank, generator)
    start = layer.matrix.detach().index_select(1, columns)
    return ColumnAdapter(columns, start, layer.in_features, config.scale)


METHOD = InPlace(
    name="paca",
    build=build,
    trained=trained,
    max_rank=any_columns,
    instead="rcla, which trains the same function",
)

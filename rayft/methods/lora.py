"""LoRA. Hu et al. 2021, arXiv:2106.09685.

    ΔW = s·B·A        A (R × I): Kaiming-uniform (a = √5)        B (O × R): 0
Trainable: R(I + O) a layer.   Export to LoRA: exact, it is one.

Backward, with g = dL/dy (N × O), h = x Aᵀ (N × R), q = s·g B (N × R):
    dB = s·gᵀ h        dA = qᵀ x        dx = g W + q A
Saved for backward: x, h and the weights. Nothing is copied to float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from rayft.methods.base import Adapter, AdapterLinear, LayerShape, LoraFactors, Method, MethodConfig

__all__ = ["METHOD", "LoraAdapter"]


class LoraFunction(torch.autograd.Function):
    """Base and low-rank update in one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Compute y = x Wᵀ + bias + s (x Aᵀ) Bᵀ."""
        x_NI = x.reshape(-1, x.shape[-1])
        h_NR = x_NI @ a.t()
        y_NO = nn.functional.linear(x_NI, weight, bias)
        y_NO.addmm_(h_NR, b.t(), alpha=scale)
        ctx.save_for_backward(x_NI, h_NR, weight, a, b)
        ctx.scale = scale
        ctx.x_shape = x.shape
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Give the gradients of x, A and B; W and its bias are frozen."""
        x_NI, h_NR, weight, a, b = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, grads[0].shape[-1])
        q_NR = (g_NO @ b).mul_(ctx.scale)
        grad_a = q_NR.t() @ x_NI if ctx.needs_input_grad[3] else None
        grad_b = (g_NO.t() @ h_NR).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g_NO @ weight).addmm_(q_NR, a).view(ctx.x_shape)
        return grad_x, None, None, grad_a, grad_b, None


class LoraAdapter(Adapter):
    """Trainable factors A and B; also runs any adapter that was loaded from factors."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.scale = scale

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute base and update together."""
        return LoraFunction.apply(x, weight, bias, self.lora_A, self.lora_B, self.scale)  # type: ignore[no-any-return,no-untyped-call]

    def to_lora(self) -> LoraFactors:
        """Give the factors themselves."""
        return LoraFactors(self.lora_A.detach(), self.lora_B.detach(), self.scale)


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> LoraAdapter:
    """Draw A Kaiming-uniform with a = √5, that is U(−1/√I, 1/√I), and set B to 0."""
    bound = 1 / math.sqrt(layer.in_features)
    a = torch.empty(config.rank, layer.in_features).uniform_(-bound, bound, generator=generator)
    b = torch.zeros(layer.out_features, config.rank)
    like = layer.weight
    return LoraAdapter(a.to(like.device, like.dtype), b.to(like.device, like.dtype), config.scale)


def trained(shape: LayerShape, rank: int) -> int:
    """Count R(I + O)."""
    return rank * (shape.inputs + shape.outputs)


METHOD = Method(
    name="lora", build=build, trained=trained, max_rank=lambda shape: min(shape.inputs, shape.outputs)
)

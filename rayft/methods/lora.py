"""LoRA. Hu et al. 2021, arXiv:2106.09685.

    ΔW = s·B·A        A (R × I): Kaiming-uniform (a = √5)        B (O × R): 0
Trainable: R(I + O) a layer.   Export to LoRA: exact, it is one.

Backward, with g = dL/dy (N × O), h = x Aᵀ (N × R), q = s·g B (N × R):
    dB = s·gᵀ h        dA = qᵀ x        dx = g W + q A
Saved for backward: x, h and the weights; where A is frozen h alone, R numbers a token. Nothing is
copied to float32. Stacked links of a chain go through the same products, [A_past; A] and [B_past B].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from rayft.kernels import low_rank_linear as kernel
from rayft.kernels.grouped_linear import Term
from rayft.methods.base import (
    Adapter,
    AdapterLinear,
    LayerShape,
    LoraFactors,
    Method,
    MethodConfig,
    unaliased,
)
from rayft.numerics import reshaped

__all__ = ["METHOD", "LoraAdapter", "LoraMethod", "gaussian", "kaiming_uniform", "low_rank", "zeros"]


class LoraFunction(torch.autograd.Function):
    """Base and low-rank update in one node of the graph, or the update alone if there is no weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        past_a: torch.Tensor | None,
        past_b: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Compute y = x Wᵀ + bias + s (x [A_past; A]ᵀ) [B_past B]ᵀ."""
        x_NI = x.reshape(-1, x.shape[-1])
        all_a, all_b = _stack(past_a, a, 0), _stack(past_b, b, 1)
        if weight is None:
            h_NK = x_NI @ all_a.t()
            y_NO = (h_NK @ all_b.t()).mul_(scale)
        else:
            y_NO, h_NK = kernel.forward(x_NI, weight, bias, all_a, all_b, scale)
        ctx.save_for_backward(
            x_NI if ctx.needs_input_grad[3] else None,
            h_NK if past_a is None else h_NK[:, -a.shape[0] :].contiguous(),
            weight, a, b, past_a, past_b,
        )  # fmt: skip
        ctx.scale = scale
        ctx.x_shape = x.shape
        return reshaped(y_NO, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, A and B; W, its bias and the past links are frozen."""
        x_NI, h_NR, weight, a, b, past_a, past_b = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, grads[0].shape[-1])
        all_a, all_b = _stack(past_a, a, 0), _stack(past_b, b, 1)
        grad_x = None
        if weight is not None and ctx.needs_input_grad[0]:
            grad_x, q_NK, grad_b = kernel.backward(g_NO, weight, all_a, all_b, h_NR, ctx.scale)
            assert q_NK is not None
        else:
            q_NK, grad_b = (g_NO @ all_b).mul_(ctx.scale), (g_NO.t() @ h_NR).mul_(ctx.scale)
            if ctx.needs_input_grad[0]:
                grad_x = q_NK @ all_a
        grad_x = None if grad_x is None else grad_x.view(ctx.x_shape)
        grad_a = q_NK[:, -a.shape[0] :].t() @ x_NI if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_a, grad_b, None, None, None


def _stack(past: torch.Tensor | None, now: torch.Tensor, dim: int) -> torch.Tensor:
    return now if past is None else torch.cat([past, now], dim)


class LoraAdapter(Adapter):
    """Factors A and B; every adapter that is loaded from factors is one of these too.

    Args:
        a: A (R × I).
        b: B (O × R).
        scale: s.
        train_a: whether A trains; B always does.
    """

    past_A: torch.Tensor | None
    past_B: torch.Tensor | None

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float, *, train_a: bool = True) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a, requires_grad=train_a)
        self.lora_B = nn.Parameter(b)
        self.register_buffer("past_A", None)
        self.register_buffer("past_B", None)
        self.scale = scale

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Compute base and update together, or, if `weight` is None, the update, which can drop inputs."""
        past_a, past_b, past = self.past_A, self.past_B, None
        if dropout:
            if past_a is not None and past_b is not None:
                # Past links behave as if merged into the base, so their inputs are not dropped.
                past = self.scale * nn.functional.linear(nn.functional.linear(x, past_a), past_b)
            x, past_a, past_b = nn.functional.dropout(x, dropout), None, None
        y: torch.Tensor = LoraFunction.apply(  # type: ignore[no-untyped-call]
            x, unaliased(weight), bias, self.lora_A, self.lora_B, past_a, past_b, self.scale
        )
        return y if past is None else y + past

    def update(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        """Compute the update; only inputs of the link that trains are dropped."""
        # Called as a module, because ZeRO-3's hooks on a module gather A and B.
        return self(x, None, None, dropout)  # type: ignore[no-any-return]

    def to_lora(self) -> LoraFactors:
        """Return the factors, all links stacked."""
        a = _stack(self.past_A, self.lora_A.detach(), 0)
        return LoraFactors(a, _stack(self.past_B, self.lora_B.detach(), 1), self.scale)

    def terms(self, rows: slice) -> list[Term]:
        """Return the link that trains as a term, after one of the past links."""
        now = Term(rows, self.lora_B, self.scale, a=self.lora_A)
        if self.past_A is None or self.past_B is None:
            return [now]
        return [Term(rows, self.past_B, self.scale, a=self.past_A), now]

    def begin_link(self, a: torch.Tensor) -> None:
        """Move the trained link to the past ones and start the next from `a` (R × I) and B = 0."""
        old = self.lora_A
        factors = self.to_lora()
        self.past_A, self.past_B = factors.a.clone(), factors.b.clone()
        self.lora_A = nn.Parameter(a.to(old.device, old.dtype), requires_grad=old.requires_grad)
        self.lora_B = nn.Parameter(torch.zeros_like(self.lora_B))


def kaiming_uniform(rank: int, inputs: int, generator: torch.Generator) -> torch.Tensor:
    """Draw A (R × I) Kaiming-uniform with a = √5, that is U(−1/√I, 1/√I)."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)


def gaussian(rank: int, inputs: int, generator: torch.Generator) -> torch.Tensor:
    """Draw A (R × I) from N(0, σ²) with σ = 1/√(3·I): the variance of the Kaiming-uniform one."""
    return torch.empty(rank, inputs).normal_(0, 1 / math.sqrt(3 * inputs), generator=generator)


def zeros(layer: AdapterLinear, rank: int) -> torch.Tensor:
    """Make B (O × R) = 0 on the layer's device, in the dtype it computes in."""
    return torch.zeros(layer.out_features, rank, dtype=layer.dtype, device=layer.weight.device)


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> LoraAdapter:
    """Draw A Kaiming-uniform and set B to 0."""
    b = zeros(layer, config.rank)
    return LoraAdapter(kaiming_uniform(config.rank, layer.in_features, generator).to(b), b, config.scale)


def trained(shape: LayerShape, rank: int) -> int:
    """Count R(I + O)."""
    return rank * (shape.inputs + shape.outputs)


def low_rank(shape: LayerShape) -> int:
    """Return the largest rank that A and B can have: min(I, O)."""
    return min(shape.inputs, shape.outputs)


@dataclass(frozen=True)
class LoraMethod(Method):
    """A method whose A and B both train, from any start and at any rank."""

    def fixed_factors(self) -> str | None:
        """Return None: A and B can take any values."""
        return None


METHOD = LoraMethod(name="lora", build=build, trained=trained, max_rank=low_rank)

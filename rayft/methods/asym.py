"""Asymmetric LoRA: A frozen and orthonormal, B trained. Zhu et al. 2024, arXiv:2402.16842.

    ΔW = s·B·A        A (R × I): random orthonormal rows, frozen        B (O × R): 0, trained
Trainable: R·O a layer.   Export to LoRA: exact, it is one.

Saved for backward: h = x Aᵀ, R numbers a token, but not x.
"""

from __future__ import annotations

import torch

from rayft.methods.base import AdapterLinear, LayerShape, Method, MethodConfig
from rayft.methods.lora import LoraAdapter, low_rank, zeros

__all__ = ["METHOD"]


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> LoraAdapter:
    """Draw A's rows orthonormal (uniformly: Mezzadri 2007, arXiv:math-ph/0609050) and set B to 0."""
    square = torch.empty(layer.in_features, config.rank, dtype=torch.float64).normal_(generator=generator)
    q_IR, r_RR = torch.linalg.qr(square)
    a = (q_IR * r_RR.diagonal().sign()).t()
    b = zeros(layer, config.rank)
    return LoraAdapter(a.contiguous().to(b), b, config.scale, train_a=False)


def trained(shape: LayerShape, rank: int) -> int:
    """Count R·O."""
    return rank * shape.outputs


METHOD = Method(name="asym", build=build, trained=trained, max_rank=low_rank)

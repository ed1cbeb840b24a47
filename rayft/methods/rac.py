"""RAC-LoRA, a randomised asymmetric chain. Malinovsky et al. 2024, arXiv:2410.08305.

    ΔW = s·Σ_j B_j·A_j        A_j (R × I): N(0, 1/(3·I)), frozen        B_j (O × R): 0, trained
Trainable: R·O a layer and link.   Export to LoRA: exact, one of rank k·R.

Links are stacked, never merged. Saved for backward: the link's h = x A_jᵀ, R numbers a token.
"""

from __future__ import annotations

import torch

from rayft.methods.asym import trained
from rayft.methods.base import AdapterLinear, Chain, MethodConfig
from rayft.methods.cola import GaussianChain
from rayft.methods.lora import gaussian, low_rank, zeros

__all__ = ["METHOD"]


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> GaussianChain:
    """Draw the first link's A, frozen, and set its B to 0."""
    b = zeros(layer, config.rank)
    a = gaussian(config.rank, layer.in_features, generator).to(b)
    return GaussianChain(a, b, config.scale, train_a=False)


METHOD = Chain(name="rac", build=build, trained=trained, max_rank=low_rank)

"""COLA, a chain of LoRAs. Xia et al. 2024, arXiv:2401.04151.

    ΔW = s·Σ_j B_j·A_j        A_j (R × I): N(0, 1/(3·I)), trained        B_j (O × R): 0, trained
Trainable: R(I + O) a layer and link.   Export to LoRA: exact, one of rank k·R.

The paper merges each link into W before it starts the next one. Here the links are stacked, which gives
the same function and leaves the base as it is. Each link has a fresh optimizer and its own warm-up.
"""

from __future__ import annotations

import torch

from rayft.methods.base import AdapterLinear, Chain, MethodConfig
from rayft.methods.lora import LoraAdapter, gaussian, low_rank, trained, zeros

__all__ = ["METHOD", "GaussianChain"]


class GaussianChain(LoraAdapter):
    """A chain whose links start from a fresh Gaussian A."""

    def advance(self, generator: torch.Generator) -> None:
        """Stack the link that trained and draw the next A."""
        rank, inputs = self.lora_A.shape
        self.begin_link(gaussian(rank, inputs, generator))


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> GaussianChain:
    """Draw the first link's A and set its B to 0."""
    b = zeros(layer, config.rank)
    return GaussianChain(gaussian(config.rank, layer.in_features, generator).to(b), b, config.scale)


METHOD = Chain(name="cola", build=build, trained=trained, max_rank=low_rank)

"""r-c³LA, a chain of cheap LoRAs over shuffled windows. Cadenhead et al. 2026, arXiv:2606.13767.

    ΔW = s·Σ_j B_j·A_j        A_j: c³LA's windows, drawn without replacement        B_j (O × R): 0, trained
Trainable: R·O a layer and link, k ≤ ⌈I/R⌉ links.   Export to LoRA: exact, one of rank k·R.

It differs from c³LA in the order of the windows, which each layer draws for itself, once. (The released
code draws overlapping offsets with replacement; this follows the paper's pseudocode.)
"""

from __future__ import annotations

import torch

from rayft.methods.asym import trained
from rayft.methods.base import AdapterLinear, Chain, MethodConfig
from rayft.methods.c3la import WindowChain, windows
from rayft.methods.cla import any_columns
from rayft.methods.lora import zeros

__all__ = ["METHOD"]


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> WindowChain:
    """Shuffle the windows and set the first B to 0."""
    order = torch.randperm(windows(layer.shape, config.rank), generator=generator)
    return WindowChain(order, zeros(layer, config.rank), layer.in_features, config.scale)


METHOD = Chain(name="rc3la", build=build, trained=trained, max_rank=any_columns, most_links=windows)

"""r-cLA, cheap LoRA on random inputs. Cadenhead et al. 2026, arXiv:2606.13767.

    ΔW = s·B·A        A (R × I): selects R distinct random inputs, frozen        B (O × R): 0, trained
Trainable: R·O a layer.   Export to LoRA: exact (A written out as a dense selector).

It differs from cLA in the choice of columns, which each layer draws for itself. (The released code draws
a contiguous window, the same for every seed, or a dense Gaussian A; this follows the paper's pseudocode.)
"""

from __future__ import annotations

import torch

from rayft.methods.asym import trained
from rayft.methods.base import AdapterLinear, Method, MethodConfig
from rayft.methods.cla import SelectorAdapter, any_columns
from rayft.methods.lora import zeros

__all__ = ["METHOD", "random_columns"]


def random_columns(layer: AdapterLinear, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Draw R distinct inputs, in ascending order, on the layer's device."""
    drawn = torch.randperm(layer.in_features, generator=generator)[:rank]
    return drawn.sort().values.to(layer.weight.device)


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> SelectorAdapter:
    """Select R random inputs and set B to 0."""
    columns = random_columns(layer, config.rank, generator)
    return SelectorAdapter(columns, zeros(layer, config.rank), layer.in_features, config.scale)


METHOD = Method(name="rcla", build=build, trained=trained, max_rank=any_columns)

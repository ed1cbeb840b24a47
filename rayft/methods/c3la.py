"""c³LA, a circulant chain of cheap LoRAs. Cadenhead et al. 2026, arXiv:2606.13767.

    ΔW = s·Σ_j B_j·A_j        A_j: selects the inputs (R(j−1) + i) mod I, i < R        B_j (O × R): 0, trained
Trainable: R·O a layer and link, k ≤ ⌈I/R⌉ links.   Export to LoRA: exact, one of rank k·R.

Each link selects the window that follows the previous link's. Links are stacked, never merged. Where R
does not divide I, the last window wraps onto columns of the first one; the contributions of such a column
add up. (The released code only moves the window, without a new B; this follows the paper's pseudocode.)
"""

from __future__ import annotations

import torch

from rayft.methods.asym import trained
from rayft.methods.base import AdapterLinear, Chain, LayerShape, MethodConfig
from rayft.methods.cla import SelectorAdapter, any_columns
from rayft.methods.lora import zeros

__all__ = ["METHOD", "WindowChain", "windows"]


class WindowChain(SelectorAdapter):
    """A chain in which each link selects one window of inputs, in a fixed order."""

    order: torch.Tensor

    def __init__(self, order: torch.Tensor, b: torch.Tensor, inputs: int, scale: float) -> None:
        first = window(int(order[0]), b.shape[1], inputs).to(b.device)
        super().__init__(first, b, inputs, scale)
        self.register_buffer("order", order.to(b.device))

    def advance(self, generator: torch.Generator) -> None:
        """Stack the link that trained and select the next window; nothing is drawn."""
        rank = self.lora_B.shape[1]
        link = self.columns.numel() // rank
        self.begin_link(window(int(self.order[link]), rank, self.inputs))


def window(number: int, rank: int, inputs: int) -> torch.Tensor:
    """Return the columns of a window, counted from 0: (R·number + i) mod I for i < R."""
    return (rank * number + torch.arange(rank)) % inputs


def windows(shape: LayerShape, rank: int) -> int:
    """Count the windows that cover all inputs: ⌈I/R⌉."""
    return -(-shape.inputs // rank)


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> WindowChain:
    """Select the windows in their order and set the first B to 0; nothing is random."""
    order = torch.arange(windows(layer.shape, config.rank))
    return WindowChain(order, zeros(layer, config.rank), layer.in_features, config.scale)


METHOD = Chain(name="c3la", build=build, trained=trained, max_rank=any_columns, most_links=windows)

"""Full fine-tuning: every parameter of the model trains.

    W = W0 + ΔW        ΔW (O × I) unrestricted
Trainable: O·I a layer, and all other parameters of the model.   Export to LoRA: none (its ΔW has
full rank); it is saved as a model folder.

It changes the base, so its trials can't share one: they run in worker groups of their own.
"""

from __future__ import annotations

import torch
from torch import nn

from rayft.errors import MethodError
from rayft.methods.base import (
    Adapter,
    AdapterLinear,
    LayerShape,
    LoraFactors,
    Method,
    MethodConfig,
    no_factors,
    unaliased,
)

__all__ = ["METHOD", "FullAdapter"]


class FullAdapter(Adapter):
    """Adds nothing: the layer's own weight trains."""

    def __init__(self, layer: AdapterLinear) -> None:
        super().__init__()
        # The layer, not its weight: an engine or a device gives the weight other storage. In a list, since
        # a module that is registered twice would train twice.
        self._layer = [layer]
        layer.weight.requires_grad_(True)

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the layer with its trained weight."""
        if weight is None:
            raise MethodError("full trains the base's own weights; it can't run beside them")
        own = unaliased(weight)
        assert own is not None
        return nn.functional.linear(x, own, bias)

    def to_lora(self) -> LoraFactors:
        """Refuse: ΔW has full rank."""
        raise no_factors("full")

    def delta(self, weight0: torch.Tensor) -> torch.Tensor:
        """Give W − W0."""
        return self._layer[0].matrix.detach() - weight0


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> FullAdapter:
    """Let the layer's weight train."""
    return FullAdapter(layer)


def trained(shape: LayerShape, rank: int) -> int:
    """Count O·I."""
    return shape.outputs * shape.inputs


METHOD = Method(
    name="full",
    build=build,
    trained=trained,
    max_rank=lambda shape: max(shape.inputs, shape.outputs) * 2**20,
    shares_base=False,
    exports_lora=False,
    ranked=False,
)

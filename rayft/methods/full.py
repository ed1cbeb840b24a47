"""Full fine-tuning: every parameter of the model trains.

    W = W0 + ΔW        ΔW (O × I) unrestricted
Trainable: O·I a layer, and all other parameters of the model.   Export to LoRA: none (its ΔW has
full rank); it is saved as a model folder.

It changes the base, so no other trial can use the base after it: a lane then loads the base again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rayft.errors import MethodError
from rayft.methods.base import (
    NO_DROPOUT,
    Adapter,
    AdapterLinear,
    LayerShape,
    LoraFactors,
    Method,
    MethodConfig,
    no_factors,
    quantised_base,
    unaliased,
)

__all__ = ["METHOD", "FullAdapter", "any_rank"]


class FullAdapter(Adapter):
    """An adapter that adds nothing; the layer's own weight trains."""

    def __init__(self, layer: AdapterLinear) -> None:
        super().__init__()
        # The layer, not its weight, because an engine or a move to a device gives the weight other storage.
        # In a list, because a module that is registered twice would train twice.
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
        """Raise MethodError, because ΔW has full rank."""
        raise no_factors("full")

    def delta(self, weight0: torch.Tensor) -> torch.Tensor:
        """Return W − W0."""
        return self._layer[0].matrix.detach() - weight0


def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> FullAdapter:
    """Let the layer's weight train."""
    return FullAdapter(layer)


def trained(shape: LayerShape, rank: int) -> int:
    """Count O·I."""
    return shape.outputs * shape.inputs


def any_rank(shape: LayerShape) -> int:
    """Return a rank above all that is asked for: the rank means nothing to this method."""
    return max(shape.inputs, shape.outputs) * 2**20


@dataclass(frozen=True)
class FullMethod(Method):
    """A method that trains the whole model."""

    @property
    def exports_lora(self) -> bool:
        """False: ΔW has full rank."""
        return False

    @property
    def saves_model(self) -> bool:
        """True: a model folder is all that can hold what trained."""
        return True

    @property
    def packs(self) -> bool:
        """False: the base's own weights train."""
        return False

    @property
    def shares_base(self) -> bool:
        """False: the base's weights before training are not kept."""
        return False

    def prepare(self, model: nn.Module) -> None:
        """Let every parameter train."""
        model.requires_grad_(True)

    def rank(self, config: MethodConfig) -> int | None:
        """Return None: the whole model trains, whatever the rank."""
        return None

    def ignored(self) -> dict[str, str]:
        """Return the settings that would do nothing; there are no factors to choose or to scale."""
        sized = ("targets", "rank_pattern", "alpha", "rslora")
        return super().ignored() | {"dropout": NO_DROPOUT} | dict.fromkeys(sized, "trains the whole model")

    def fixed_factors(self) -> str | None:
        """Return the reason: there are no factors."""
        return "it trains the whole model and has no factors"

    def check_base(self, *, quantised: bool = False, partitioned: bool = False) -> None:
        """Refuse a quantised base.

        Raises:
            MethodError: with the way out.
        """
        if quantised:
            raise quantised_base(self.name, "a method that adds to the base")


METHOD = FullMethod(name="full", build=build, trained=trained, max_rank=any_rank)

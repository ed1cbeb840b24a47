"""The contract of a fine-tuning method, and the one layer that runs it.

A linear layer holds W0 (O × I). A method gives it an adapter, so that the layer computes

    y = x (W0 + ΔW)ᵀ + b                    ΔW = s·B·A,  B (O × R),  A (R × I)

with s = α/R, or α/√R with rsLoRA (arXiv:2312.03732). To add a method: one file that defines a
`Method`, one line in `methods/__init__.py`.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from rayft.config import Section
from rayft.errors import MethodError, TargetError

__all__ = ["Adapter", "AdapterLinear", "LayerShape", "LoraFactors", "Method", "MethodConfig"]


class MethodConfig(Section):
    """Which method, and its knobs."""

    name: str = "lora"
    """A key of `rayft.methods.METHODS`."""

    rank: int = Field(default=16, ge=1)
    """Rank R of each module's update (ignored by `full`)."""

    alpha: float | None = Field(default=None, gt=0)
    """Scale numerator α; 2·rank where it is not given."""

    rslora: bool = False
    """Scale by α/√R instead of α/R."""

    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, one regular expression over module names, or a list of last name parts."""

    @model_validator(mode="after")
    def _targets_not_empty(self) -> MethodConfig:
        if not self.targets:
            raise ValueError("is empty; name at least one module or write 'all-linear'")
        return self

    @property
    def scale(self) -> float:
        """The factor s of ΔW = s·B·A."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.rslora else alpha / self.rank


@dataclass(frozen=True)
class LayerShape:
    """Size of one linear layer: `outputs` × `inputs`."""

    outputs: int
    inputs: int


@dataclass(frozen=True)
class LoraFactors:
    """ΔW = scale·B·A in factors: `b` (O × R), `a` (R × I).

    Where A only selects inputs, `columns` names them (R indices) and `a` is that selector, dense.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    columns: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """The inner dimension R."""
        return self.a.shape[0]

    def delta(self) -> torch.Tensor:
        """Multiply out ΔW (O × I) in the factors' dtype."""
        return self.scale * (self.b @ self.a)


class Adapter(nn.Module, ABC):
    """What a method adds to one linear layer. Two methods to write, one more where ΔW has no factors."""

    @abstractmethod
    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute x (weight + ΔW)ᵀ + bias: x (…, I) → (…, O), in x's dtype."""

    @abstractmethod
    def to_lora(self) -> LoraFactors:
        """Give ΔW as factors, detached, in the adapter's dtype.

        Raises:
            MethodError: if ΔW is not of low rank.
        """

    def delta(self, weight0: torch.Tensor) -> torch.Tensor:
        """Give ΔW (O × I); `weight0` is the weight before training, for methods that changed it."""
        return self.to_lora().delta().to(weight0.dtype)


class AdapterLinear(nn.Module):
    """A linear layer that computes its base and its adapter together.

    It takes over the parameters of the linear that it replaces under the same names, so the base's
    state dict keeps its keys; `adapter` may be set to another one, or to None for the base alone.
    """

    def __init__(self, linear: nn.Linear, adapter: Adapter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.adapter = adapter

    @property
    def shape(self) -> LayerShape:
        """The layer's size."""
        return LayerShape(outputs=self.out_features, inputs=self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (…, I) → (…, O)."""
        if self.adapter is None:
            return functional.linear(x, self.weight, self.bias)
        return self.adapter(x, self.weight, self.bias)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Name the size for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


@dataclass(frozen=True)
class Method:
    """A method as the registry knows it."""

    name: str
    build: Callable[[AdapterLinear, MethodConfig, torch.Generator], Adapter]
    """Make the adapter of one layer; the generator decides everything that is random."""
    trained: Callable[[LayerShape, int], int]
    """Count the numbers that train in one layer at a rank."""
    max_rank: Callable[[LayerShape], int]
    """The largest rank that a layer can hold."""
    shares_base: bool = True
    """Whether the base stays untouched, so that trials can share it (a lane needs that)."""
    exports_lora: bool = True
    """Whether a trained adapter is a LoRA, and so can be squeezed, promoted and served."""

    def check(self, shape: LayerShape, rank: int, module: str) -> None:
        """Refuse a rank that a layer can't hold.

        Raises:
            TargetError: naming the module and the largest rank it takes.
        """
        limit = self.max_rank(shape)
        if rank > limit:
            raise TargetError(
                f"rank {rank} is above what {module} ({shape.outputs}x{shape.inputs}) can hold with "
                f"'{self.name}': use a rank of at most {limit}, or leave the module out of targets"
            )


def no_factors(name: str) -> MethodError:
    """Make the error of a method whose update has no low-rank factors."""
    return MethodError(
        f"'{name}' has no low-rank factors, so it can't be exported as LoRA, squeezed or promoted; "
        "it is saved as a model folder"
    )

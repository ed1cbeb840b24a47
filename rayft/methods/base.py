"""The contract of a fine-tuning method, and the one layer that runs it.

A linear layer holds W0 (O × I). A method gives it an adapter, so that the layer computes

    y = x (W0 + ΔW)ᵀ + b                    ΔW = s·B·A,  B (O × R),  A (R × I)

with s = α/R, or α/√R with rsLoRA (arXiv:2312.03732). A chain trains one link of rank R after the
other; its links are stacked, A = [A_1; …; A_k] and B = [B_1 … B_k], and never merged into W0. To add
a method: one file that defines a `Method`, one line in `methods/__init__.py`.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from rayft.errors import MethodError, TargetError
from rayft.methods.section import ChainConfig, MethodConfig

__all__ = [
    "Adapter",
    "AdapterLinear",
    "ChainConfig",
    "LayerShape",
    "LoraFactors",
    "Method",
    "MethodConfig",
    "unaliased",
]


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

    @property
    def compact(self) -> bool:
        """Whether A and B have no more numbers than ΔW multiplied out."""
        return self.a.numel() + self.b.numel() <= self.b.shape[0] * self.a.shape[1]

    def to(self, device: str | torch.device) -> LoraFactors:
        """Give the same factors on a device."""
        return LoraFactors(self.a.to(device), self.b.to(device), self.scale, self.columns)

    def delta(self) -> torch.Tensor:
        """Multiply out ΔW (O × I) in the factors' dtype."""
        return self.scale * (self.b @ self.a)


class Adapter(nn.Module, ABC):
    """What a method adds to one linear layer.

    Two methods to write; `delta` where ΔW has no factors, `advance` for a chain, `restore` for what
    changes the base.
    """

    dropout: float = 0.0
    """Probability with which inputs of the update are dropped in training (never the base's)."""

    @abstractmethod
    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute x (weight + ΔW)ᵀ + bias: x (…, I) → (…, O), in x's dtype; x ΔWᵀ alone without a weight."""

    @abstractmethod
    def to_lora(self) -> LoraFactors:
        """Give ΔW as factors, detached, all links of a chain stacked.

        Raises:
            MethodError: if ΔW is not of low rank.
        """

    def delta(self, weight0: torch.Tensor) -> torch.Tensor:
        """Give ΔW (O × I); `weight0` is the weight before training, for methods that changed it."""
        return self.to_lora().delta().to(weight0.dtype)

    def update(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        """Compute x ΔWᵀ alone, its inputs dropped with a probability."""
        return self(functional.dropout(x, dropout) if dropout else x, None, None)  # type: ignore[no-any-return]

    def advance(self, generator: torch.Generator) -> None:
        """Freeze the link that trained and begin the next one (chains only)."""
        raise MethodError(f"{type(self).__name__} is no chain, so it has no next link")

    def restore(self, weight: torch.Tensor) -> None:
        """Undo, bit by bit, what the adapter changed in its layer's weight (O × I)."""


class AdapterLinear(nn.Module):
    """A linear layer that computes its base and its adapter together.

    It takes over the parameters of the layer that it replaces under the same names, so the base's
    state dict keeps its keys; `adapter` may be set to another one, or to None for the base alone. The
    base is an `nn.Linear`, a `Conv1D` as in GPT-2 (weight I × O), or a quantised linear layer, which
    then computes for itself while the adapter adds to it, in `dtype`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, base: nn.Module, adapter: Adapter | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.transposed = not isinstance(base, nn.Linear)
        if isinstance(base, nn.Linear):
            self.in_features, self.out_features = base.in_features, base.out_features
        else:
            self.in_features, self.out_features = base.weight.shape  # type: ignore[misc]
        # A quantised layer keeps its own forward; held in a list, since its parameters are registered here.
        self.quantised = [base] if type(base).__module__.startswith("bitsandbytes") else []
        self.weight, self.bias = base.weight, base.bias  # type: ignore[assignment]
        self._dtype = dtype
        self.adapter = adapter

    @property
    def shape(self) -> LayerShape:
        """The layer's size."""
        return LayerShape(outputs=self.out_features, inputs=self.in_features)

    @property
    def dtype(self) -> torch.dtype:
        """What adapters compute in: the weight's dtype, of a quantised layer the one it computes in."""
        if not self.quantised:
            return self.weight.dtype
        return self._dtype or torch.get_default_dtype()

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as O × I (a view where the layer stores it transposed).

        Raises:
            MethodError: if it is quantised, and so no matrix.
        """
        if self.quantised:
            raise MethodError("a quantised weight can't be read as a matrix")
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (…, I) → (…, O)."""
        adapter = self.adapter
        if adapter is None:
            return self._base(x)
        dropped = adapter.dropout if self.training else 0.0
        if not dropped and not self.quantised:
            return adapter(x, self.matrix, self.bias)  # type: ignore[no-any-return]
        return self._base(x) + adapter.update(x, dropped)

    def extra_repr(self) -> str:
        """Name the size for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        if self.quantised:
            return self.quantised[0](x)  # type: ignore[no-any-return]
        return functional.linear(x, self.matrix, self.bias)


@dataclass(frozen=True)
class Method:
    """A method as the registry knows it."""

    name: str
    build: Callable[[AdapterLinear, MethodConfig, torch.Generator], Adapter]
    """Make the adapter of one layer; the generator decides everything that is random."""
    trained: Callable[[LayerShape, int], int]
    """Count the numbers that train in one layer at a rank (of a chain: at once, in one link)."""
    max_rank: Callable[[LayerShape], int]
    """The largest rank that a layer can hold."""
    shares_base: bool = True
    """Whether the base is again what it was when a trial ends, so that trials can share it (a lane)."""
    exports_lora: bool = True
    """Whether a trained adapter is a LoRA, and so can be squeezed, promoted and served."""
    chained: bool = False
    """Whether it trains one link after the other."""
    max_links: Callable[[LayerShape, int], int] | None = None
    """The most links that a layer can hold at a rank; any number where not given."""
    in_place: bool = False
    """Whether it trains numbers of the base's own weights: whole, dense, and its own while it trains."""
    b_learns_faster: bool = False
    """Whether B's learning rate is `lr_ratio` times A's."""
    ranked: bool = True
    """Whether `rank` decides its size."""
    rival: bool = False
    """Whether its layers are PEFT's (`rayft.methods.rival`)."""
    free_factors: bool = False
    """Whether A and B both train and may hold anything: start from an adapter's, and change their rank."""

    @property
    def saves_model(self) -> bool:
        """Whether it leaves a whole model behind, and no adapter."""
        return not (self.exports_lora or self.rival)

    def stored(self, shape: LayerShape, rank: int, links: int) -> int:
        """Count the numbers that are kept of one layer: those of all links."""
        return self.trained(shape, rank) * links

    def check(self, shape: LayerShape, rank: int, module: str, links: int = 1) -> None:
        """Refuse a rank or a chain that a layer can't hold.

        Raises:
            TargetError: naming the module and what it takes at most.
        """
        limit, size = self.max_rank(shape), f"{shape.outputs}x{shape.inputs}"
        if rank > limit:
            raise TargetError(
                f"rank {rank} is above what {module} ({size}) can hold with '{self.name}': use a rank of at "
                f"most {limit}, or leave the module out of targets"
            )
        most = self.max_links(shape, rank) if self.max_links else links
        if links > most:
            raise TargetError(
                f"a chain of {links} links of rank {rank} is longer than {module} ({size}) can hold with "
                f"'{self.name}': use at most {most} links, a lower rank, or leave the module out of targets"
            )

    def check_settings(self, config: MethodConfig) -> None:
        """Refuse settings that would do nothing.

        Raises:
            MethodError: naming the setting and the methods that it is for.
        """
        if config.chain is not None and not self.chained:
            raise MethodError(
                f"'{self.name}' is no chain, so method.chain does nothing: drop it, or use cola, rac, c3la "
                "or rc3la"
            )
        if config.lr_ratio is not None and not self.b_learns_faster:
            raise MethodError(
                f"'{self.name}' has one learning rate, so method.lr_ratio does nothing: drop it, or use "
                "lora_plus"
            )
        if config.dropout and (self.in_place or not self.shares_base):
            raise MethodError(
                f"'{self.name}' trains the base's own weights, whose inputs can't be dropped: set dropout: 0"
            )
        plain = MethodConfig(name=config.name)
        sized = ("targets", "rank_pattern", "alpha", "rslora")
        idle = [setting for setting in sized if getattr(config, setting) != getattr(plain, setting)]
        if idle and not (self.ranked or self.rival):
            raise MethodError(
                f"'{self.name}' trains the whole model, so method.{idle[0]} does nothing: drop it"
            )
        if config.options and not self.rival:
            raise MethodError(
                f"'{self.name}' takes no options: drop method.options, which are for peft:<Class>"
            )

    def check_free(self, setting: str, way_out: str) -> None:
        """Refuse what needs factors that may hold anything, of any rank.

        Raises:
            MethodError: with the reason and the way out.
        """
        if self.free_factors:
            return
        if self.rival:
            why = "its layers are PEFT's own"
        elif self.saves_model:
            why = "it trains the whole model and has no factors"
        elif self.in_place:
            why = "it trains columns of the base's own weights"
        elif self.chained:
            why = "its factors are a chain's links, each begun in its own way"
        else:
            why = "its A is frozen, and any other A would no longer be the method's"
        raise MethodError(f"{setting} is for lora and lora_plus, not for '{self.name}': {why}. {way_out}")

    def check_base(self, *, quantised: bool = False, partitioned: bool = False) -> None:
        """Refuse a base whose weights are not there to be trained.

        Raises:
            MethodError: with the way out.
        """
        trains_weights = self.in_place or not self.shares_base
        if trains_weights and quantised:
            raise MethodError(
                f"'{self.name}' trains the base's own weights, which a quantised base has not: drop "
                "model.quantize, or use a method that adds to the base (rcla is paca's function)"
            )
        if self.in_place and partitioned:
            raise MethodError(
                f"'{self.name}' writes into the base's weights, which ZeRO-3 partitions: use scale.zero 0, 1 "
                "or 2, or rcla, which trains the same function"
            )


def unaliased(weight: torch.Tensor | None) -> torch.Tensor | None:
    """Return the parameter behind a weight that a module was called with.

    ZeRO-3 (DeepSpeed) passes a module aliases of its inputs, parameters too. What is saved of an alias for
    the backward pass stays in memory until then; a parameter is released after its layer and fetched again.
    """
    return getattr(weight, "ds_param_alias", weight)


def no_factors(name: str) -> MethodError:
    """Make the error of a method whose update has no low-rank factors."""
    return MethodError(
        f"'{name}' has no low-rank factors, so it can't be exported as LoRA, squeezed or promoted; "
        "it is saved as a model folder"
    )

"""The contract of a fine-tuning method, and the one layer that runs it.

A linear layer holds W0 (O × I). A method gives it an adapter, so that the layer computes

    y = x (W0 + ΔW)ᵀ + b                    ΔW = s·B·A,  B (O × R),  A (R × I)

with s = α/R, or α/√R with rsLoRA (arXiv:2312.03732). A chain trains one link of rank R after the
other; its links are stacked, A = [A_1; …; A_k] and B = [B_1 … B_k], and never merged into W0. Adding
a method takes one file that defines a `Method` and one line in `methods/__init__.py`.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from rayft.errors import MethodError, TargetError
from rayft.kernels.grouped_linear import Term
from rayft.methods.section import ChainConfig, MethodConfig

__all__ = [
    "NO_DROPOUT",
    "Adapter",
    "AdapterLinear",
    "Chain",
    "ChainConfig",
    "InPlace",
    "LayerShape",
    "LoraFactors",
    "Method",
    "MethodConfig",
    "ParameterGroup",
    "is_quantised",
    "no_factors",
    "quantised_base",
    "unaliased",
]


@dataclass(frozen=True)
class LayerShape:
    """Size of one linear layer: `outputs` × `inputs`."""

    outputs: int
    inputs: int


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """ΔW = scale·B·A in factors: `b` (O × R), `a` (R × I).

    Where A only selects inputs, `columns` holds their indices (R) and `a` is that selector as a matrix. Two
    objects are equal only if they are the same.
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
        """Whether A and B together have no more numbers than ΔW."""
        return self.a.numel() + self.b.numel() <= self.b.shape[0] * self.a.shape[1]

    def to(self, device: str | torch.device) -> LoraFactors:
        """Return the same factors on a device."""
        return LoraFactors(self.a.to(device), self.b.to(device), self.scale, self.columns)

    def delta(self) -> torch.Tensor:
        """Compute ΔW (O × I) in the factors' dtype."""
        return self.scale * (self.b @ self.a)


class Adapter(nn.Module, ABC):
    """What a method adds to one linear layer.

    A subclass implements `forward` and `to_lora`. It overrides `delta` if ΔW has no factors, `advance` if
    it is a chain, and `restore` if it changes the base.
    """

    dropout: float = 0.0
    """Probability with which inputs of the update are dropped in training; the base's never are."""

    @abstractmethod
    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute x (weight + ΔW)ᵀ + bias, or x ΔWᵀ if `weight` is None: x (…, I) → (…, O), in x's dtype."""

    @abstractmethod
    def to_lora(self) -> LoraFactors:
        """Return ΔW as factors, detached; those of a chain are all its links, stacked.

        Raises:
            MethodError: if ΔW is not of low rank.
        """

    def delta(self, weight0: torch.Tensor) -> torch.Tensor:
        """Return ΔW (O × I); `weight0` (O × I) is the weight before training, for methods that change it."""
        return self.to_lora().delta().to(weight0.dtype)

    def update(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        """Compute x ΔWᵀ, dropping each input with the probability `dropout`."""
        return self(functional.dropout(x, dropout) if dropout else x, None, None)  # type: ignore[no-any-return]

    def terms(self, rows: slice) -> list[Term] | None:
        """Return the update of some rows as terms s·B·A, for a batch that several adapters share.

        Terms of all adapters are computed by one kernel. Without them (None, the default), `update` is called
        for the adapter's rows.

        Args:
            rows: the adapter's tokens in the batch.
        """
        return None

    def advance(self, generator: torch.Generator) -> None:
        """Freeze the link that trained and begin the next one.

        Raises:
            MethodError: if it is no chain.
        """
        raise MethodError(f"{type(self).__name__} is no chain, so it has no next link")

    def restore(self, weight: torch.Tensor) -> None:
        """Undo, bit by bit, what the adapter changed in its layer's weight (O × I)."""


class AdapterLinear(nn.Module):
    """A linear layer that computes its base and its adapter together.

    It takes over the parameters of the layer that it replaces under the same names, so the base's
    state dict keeps its keys. `adapter` may be set to another adapter, or to None for the base alone.

    Args:
        base: an `nn.Linear`, a `Conv1D` as in GPT-2 (weight I × O), or a quantised linear layer, which
            computes its own product; the adapter's update is added to that.
        adapter: the adapter.
        dtype: of adapters on a quantised base, whose weight's dtype says nothing about it.
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
        # In a list, because a module attribute would register the parameters a second time.
        self.quantised = [base] if is_quantised(base) else []
        self.weight, self.bias = base.weight, base.bias  # type: ignore[assignment]
        self._dtype = dtype
        self.adapter = adapter

    @property
    def shape(self) -> LayerShape:
        """The layer's size."""
        return LayerShape(outputs=self.out_features, inputs=self.in_features)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that adapters compute in: the weight's, or that of a quantised layer's products."""
        if not self.quantised:
            return self.weight.dtype
        return self._dtype or torch.get_default_dtype()

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as O × I, which is a view where the layer stores it transposed.

        Raises:
            MethodError: if it is quantised, and so is no matrix.
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
        """Return the size, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        if self.quantised:
            return self.quantised[0](x)  # type: ignore[no-any-return]
        return functional.linear(x, self.matrix, self.bias)


@dataclass(frozen=True)
class ParameterGroup:
    """How the optimizer treats a parameter."""

    lr_factor: float = 1.0
    """The parameter's learning rate over the run's."""
    decays: bool = True
    """Whether weight decay applies to it."""


@dataclass(frozen=True)
class Method:
    """A fine-tuning method: the adapter that it builds, and how it differs from the usual.

    As it stands, this class describes a method that adds factors to a base that it leaves alone, with one
    frozen factor. `Chain` and `InPlace` are the two common other kinds; a method with a behaviour of its
    own overrides it in a subclass in its own file.
    """

    name: str
    build: Callable[[AdapterLinear, MethodConfig, torch.Generator], Adapter]
    """Make the adapter of one layer; the generator decides everything that is random."""
    trained: Callable[[LayerShape, int], int]
    """Count the numbers that train in one layer at a rank (of a chain: at once, in one link)."""
    max_rank: Callable[[LayerShape], int]
    """Return the largest rank that a layer can hold."""

    @property
    def exports_lora(self) -> bool:
        """Whether a trained adapter is a LoRA, and so can be squeezed, promoted and served."""
        return True

    @property
    def saves_model(self) -> bool:
        """Whether a run leaves a whole model behind, and no adapter."""
        return False

    @property
    def shares_base(self) -> bool:
        """Whether clearing the model makes the base what it was, so that further trials can use it."""
        return True

    @property
    def packs(self) -> bool:
        """Whether its trials can share a batch with others: the base stays as it is."""
        return True

    @property
    def widens(self) -> bool:
        """Whether its export is in float32, so that no product or difference of 16-bit numbers is rounded."""
        return False

    def prepare(self, model: nn.Module) -> None:
        """Set what trains in the model beside the adapters; the model is frozen when this is called."""

    def rank(self, config: MethodConfig) -> int | None:
        """Return the rank that decides the adapter's size; None if the size doesn't depend on a rank."""
        return config.rank

    def alpha(self, config: MethodConfig) -> float | None:
        """Return the scale's numerator α; None if the method has none."""
        return None if self.rank(config) is None else config.alpha or 2.0 * config.rank

    def max_links(self, shape: LayerShape, rank: int) -> float:
        """Return the most links that a layer can hold at a rank: 1 for a method that is no chain."""
        return 1

    def settled(self, config: MethodConfig) -> MethodConfig:
        """Fill in the settings that follow from the method: its name in its one spelling."""
        return config if config.name == self.name else config.model_copy(update={"name": self.name})

    def parameter_group(self, parameter: str, config: MethodConfig) -> ParameterGroup:
        """Return how the optimizer treats a parameter, given its path in the model."""
        return ParameterGroup()

    def stored(self, shape: LayerShape, rank: int, links: int) -> int:
        """Count the numbers that are kept of one layer: those of all links."""
        return self.trained(shape, rank) * links

    def learnt(self, shape: LayerShape, rank: int) -> int:
        """Count the numbers that training chose in a layer's factors of a rank (of a chain: of all links)."""
        return self.trained(shape, rank)

    def ignored(self) -> dict[str, str]:
        """Return the settings that would do nothing: setting → the reason, as a predicate of the method."""
        return {
            "chain": "is no chain",
            "lr_ratio": "has one learning rate",
            "options": "takes no options",
        }

    def fixed_factors(self) -> str | None:
        """Return why A and B can't take any values and any rank; None if they can.

        Only where they can may a run start from another adapter's factors, or change their rank.
        """
        return "its A is frozen, and any other A would no longer be the method's"

    def check(self, shape: LayerShape, rank: int, module: str, links: int = 1) -> None:
        """Refuse a rank or a chain that a layer can't hold.

        Raises:
            TargetError: naming the module and the most that it can hold.
        """
        limit, size = self.max_rank(shape), f"{shape.outputs}x{shape.inputs}"
        if rank > limit:
            raise TargetError(
                f"rank {rank} is above what {module} ({size}) can hold with '{self.name}': use a rank of at "
                f"most {limit}, or leave the module out of targets"
            )
        most = self.max_links(shape, rank)
        if links > most:
            raise TargetError(
                f"a chain of {links} links of rank {rank} is longer than {module} ({size}) can hold with "
                f"'{self.name}': use at most {most} links, a lower rank, or leave the module out of targets"
            )

    def check_settings(self, config: MethodConfig) -> None:
        """Refuse values that the method can't use, of settings that it does use.

        Raises:
            MethodError: naming the setting.
        """

    def check_base(self, *, quantised: bool = False, partitioned: bool = False) -> None:
        """Refuse a base that the method can't train on.

        Args:
            quantised: whether the weights of adapted layers are quantised.
            partitioned: whether ZeRO-3 partitions the weights among the processes.

        Raises:
            MethodError: with the way out.
        """


@dataclass(frozen=True)
class Chain(Method):
    """A method that trains one link of rank R after the other; its adapters implement `advance`."""

    most_links: Callable[[LayerShape, int], int] | None = None
    """Return the most links that a layer can hold at a rank; any number where not given."""

    def max_links(self, shape: LayerShape, rank: int) -> float:
        """Return the most links that a layer can hold at a rank; infinity if there is no limit."""
        return self.most_links(shape, rank) if self.most_links else math.inf

    def settled(self, config: MethodConfig) -> MethodConfig:
        """Fill in the default number of links where none is given."""
        config = super().settled(config)
        return config if config.chain else config.model_copy(update={"chain": ChainConfig()})

    def ignored(self) -> dict[str, str]:
        """Return the settings that would do nothing; a chain uses `chain`."""
        return {setting: why for setting, why in super().ignored().items() if setting != "chain"}

    def fixed_factors(self) -> str | None:
        """Return the reason: each link has its own start."""
        return "its factors are a chain's links, each begun in its own way"


@dataclass(frozen=True)
class InPlace(Method):
    """A method that trains numbers of the base's own weights; its adapters implement `restore`.

    The weights must be there, whole and unquantised, but the base is what it was after `restore`.
    """

    instead: str = "a method that adds to the base"
    """What errors recommend in its place where the base's weights can't be trained."""

    @property
    def packs(self) -> bool:
        """False: the base's own weights train."""
        return False

    @property
    def widens(self) -> bool:
        """True: the export is a difference of weights."""
        return True

    def parameter_group(self, parameter: str, config: MethodConfig) -> ParameterGroup:
        """Exempt the adapter from weight decay, which would pull weights of the base towards zero."""
        return ParameterGroup(decays=".adapter." not in parameter)

    def ignored(self) -> dict[str, str]:
        """Return the settings that would do nothing: dropout too."""
        return super().ignored() | {"dropout": NO_DROPOUT}

    def fixed_factors(self) -> str | None:
        """Return the reason: the numbers that train are the base's."""
        return "it trains columns of the base's own weights"

    def check_base(self, *, quantised: bool = False, partitioned: bool = False) -> None:
        """Refuse a base whose weights are quantised or partitioned.

        Raises:
            MethodError: with the way out.
        """
        if quantised:
            raise quantised_base(self.name, self.instead)
        if partitioned:
            raise MethodError(
                f"'{self.name}' writes into the base's weights, which ZeRO-3 partitions: use scale.zero 0, 1 "
                f"or 2, or {self.instead}"
            )


NO_DROPOUT = "trains the base's own weights, whose inputs can't be dropped"
"""Why `dropout` does nothing where a method trains the base's weights."""


def quantised_base(name: str, instead: str) -> MethodError:
    """Make the error of a method that trains the base's weights and meets a quantised base."""
    return MethodError(
        f"'{name}' trains the base's own weights, which a quantised base does not have: drop "
        f"model.quantize, or use {instead}"
    )


def is_quantised(layer: nn.Module) -> bool:
    """Return whether a linear layer holds codes in place of its weight's numbers, as bitsandbytes' do."""
    weight = layer.weight
    return isinstance(weight, torch.Tensor) and not weight.is_floating_point()


def unaliased(weight: torch.Tensor | None) -> torch.Tensor | None:
    """Return the parameter behind a weight that a module was called with.

    ZeRO-3 (DeepSpeed) calls a module with aliases of its inputs, including parameters. An alias that is
    saved for the backward pass stays in memory until then. A parameter that is saved is released after its
    layer and fetched again.
    """
    return getattr(weight, "ds_param_alias", weight)


def no_factors(name: str) -> MethodError:
    """Make the error for a method whose update has no low-rank factors."""
    return MethodError(
        f"'{name}' has no low-rank factors, so it can't be exported as LoRA, squeezed or promoted; "
        "it is saved as a model folder"
    )

"""Methods broken on purpose: each must fail the suite, or the suite proves nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from rayft.methods import METHODS
from rayft.methods.base import Adapter, AdapterLinear, LoraFactors, Method, MethodConfig
from rayft.methods.cla import SelectorAdapter
from rayft.methods.full import FullAdapter
from rayft.methods.lora import LoraAdapter
from tests.contract.methods_contract import Case, run_all


@dataclasses.dataclass(frozen=True)
class Target:
    """What an adapter was built for."""

    layer: AdapterLinear
    config: MethodConfig


def mutant(of: str, change: Callable[[Any, Target], Adapter]) -> Method:
    """A method whose freshly built adapter is spoilt by `change`."""
    original = METHODS[of]

    def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> Adapter:
        return change(original.build(layer, config, generator), Target(layer, config))

    return dataclasses.replace(original, build=build)


def alpha_not_divided(adapter: Any, target: Target) -> Adapter:
    assert target.config.alpha is not None
    adapter.scale = target.config.alpha
    return adapter


def scale_is_squared(adapter: Any, target: Target) -> Adapter:
    adapter.scale = target.config.scale**2
    return adapter


def rslora_ignored(adapter: Any, target: Target) -> Adapter:
    assert target.config.alpha is not None
    adapter.scale = target.config.alpha / target.config.rank
    return adapter


class ScaledTwice(LoraAdapter):
    """Forward scales by s², the export says s."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        base = functional.linear(x, weight, bias)
        return base + self.scale**2 * (x @ self.lora_A.t() @ self.lora_B.t())


class Transposed(LoraAdapter):
    """Uses A where B belongs; only square layers let it."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        base = functional.linear(x, weight, bias)
        return base + self.scale * (x @ self.lora_B @ self.lora_A)


class ExportsSwapped(LoraAdapter):
    """Exports Aᵀ as B and Bᵀ as A."""

    def to_lora(self) -> LoraFactors:
        return LoraFactors(self.lora_B.detach().t(), self.lora_A.detach().t(), self.scale)


class ReadsNextColumn(SelectorAdapter):
    """Gathers the input after the one it names."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        chosen = x[..., (self.columns + 1) % self.inputs]
        return functional.linear(x, weight, bias) + self.scale * (chosen @ self.lora_B.t())


class _WrongGradient(torch.autograd.Function):
    """Forward of a selector; backward puts x's gradient into the next column."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(columns)
        ctx.shape = x.shape
        return x[..., columns]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (columns,) = ctx.saved_tensors
        grad = torch.zeros(ctx.shape, dtype=grads[0].dtype)
        return grad.index_add(-1, (columns + 1) % ctx.shape[-1], grads[0]), None


class ScattersNextColumn(SelectorAdapter):
    """Right forward, wrong backward."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        chosen = _WrongGradient.apply(x, self.columns)
        return functional.linear(x, weight, bias) + self.scale * (chosen @ self.lora_B.t())


class NamesNextColumn(SelectorAdapter):
    """Exports the columns shifted by one."""

    def to_lora(self) -> LoraFactors:
        right = super().to_lora()
        assert right.columns is not None
        shifted = tuple((column + 1) % self.inputs for column in right.columns)
        return dataclasses.replace(right, columns=shifted)


def as_class(cls: type[Adapter]) -> Callable[[Any, Target], Adapter]:
    """Turn a built adapter into one of a broken subclass."""

    def change(adapter: Any, target: Target) -> Adapter:
        adapter.__class__ = cls
        return adapter

    return change


def starts_swapped(adapter: Any, target: Target) -> Adapter:
    """A starts at 0 and B at random: the identity too, but not LoRA's."""
    adapter.lora_B.data.fill_(1)
    adapter.lora_A.data.zero_()
    return adapter


def freezes_a(adapter: Any, target: Target) -> Adapter:
    adapter.lora_A.requires_grad_(False)
    return adapter


def selector_outside_the_state_dict(adapter: Any, target: Target) -> Adapter:
    adapter.columns = torch.randperm(adapter.inputs)[: target.config.rank]
    return adapter


class UpdateUnscaled(LoraAdapter):
    """s is forgotten where there is no base to add to."""

    def update(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        return super().update(x, dropout) / self.scale


class UpdateDetached(SelectorAdapter):
    """The update alone passes no gradient to x."""

    def update(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        return super().update(x.detach(), dropout) + 0 * x.sum()


class DropsUnscaled(LoraAdapter):
    """What is kept is not divided by 1 − p."""

    def update(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        return super().update(x, dropout) * (1 - dropout)


class KeepsInsteadOfDropping(SelectorAdapter):
    """p is taken for the probability to keep."""

    def update(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        return super().update(x, 1 - dropout if dropout else 0.0)


class NeverDrops(LoraAdapter):
    """Dropout does nothing."""

    def update(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        return super().update(x)


class DropsTheBase(AdapterLinear):
    """The base's product loses inputs too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.adapter is not None and self.training:
            return super().forward(functional.dropout(x, self.adapter.dropout))
        return super().forward(x)


class DropsInEvaluation(AdapterLinear):
    """Dropout is never off."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.adapter is None or not self.adapter.dropout:
            return super().forward(x)
        return self._base(x) + self.adapter.update(x, self.adapter.dropout)


class WritesIntoTheBase(LoraAdapter):
    """Merges itself into the weight as it trains."""

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        y = super().forward(x, weight, bias)
        if weight is not None and x.requires_grad:
            weight.data += self.to_lora().delta()
        return y


class Stale(Adapter):
    """Full fine-tuning that holds the weight, not the layer: a copy keeps the old one's."""

    def __init__(self, layer: AdapterLinear) -> None:
        super().__init__()
        self._weight = [layer.matrix.detach() if layer.transposed else layer.weight]

    forward = FullAdapter.forward
    to_lora = FullAdapter.to_lora

    def delta(self, weight0: torch.Tensor) -> torch.Tensor:
        return self._weight[0].detach() - weight0


def in_layer(cls: type[AdapterLinear]) -> Callable[[Any, Target], Adapter]:
    """Turn the layer itself into a broken one."""

    def change(adapter: Any, target: Target) -> Adapter:
        target.layer.__class__ = cls
        return adapter

    return change


SQUARE = Case(outputs=6, inputs=6, rank=3, dtype=torch.float64, alpha=5.0)
ROOT = dataclasses.replace(SQUARE, rslora=True)
FULL_RANK = dataclasses.replace(SQUARE, rank=6)
DROPOUT = "drops_inputs_of_the_update_only"

MUTANTS: dict[str, tuple[Method, Case, str]] = {
    "lora: alpha not divided by r": (mutant("lora", alpha_not_divided), SQUARE, "exports_its_delta"),
    "cla: alpha not divided by r": (mutant("cla", alpha_not_divided), SQUARE, "exports_its_delta"),
    "lora: scale squared": (mutant("lora", scale_is_squared), SQUARE, "exports_its_delta"),
    "lora: scale applied twice": (mutant("lora", as_class(ScaledTwice)), SQUARE, "computes_w_plus_delta"),
    "lora: rslora ignored": (mutant("lora", rslora_ignored), ROOT, "exports_its_delta"),
    "lora: A and B swapped": (mutant("lora", as_class(Transposed)), FULL_RANK, "computes_w_plus_delta"),
    "lora: exported swapped": (mutant("lora", as_class(ExportsSwapped)), SQUARE, "starts_with_b_zero"),
    "lora: A starts at 0": (mutant("lora", starts_swapped), SQUARE, "starts_with_b_zero"),
    "lora: A frozen": (mutant("lora", freezes_a), SQUARE, "trains_what_it_declares"),
    "cla: gathers off by one": (mutant("cla", as_class(ReadsNextColumn)), SQUARE, "computes_w_plus_delta"),
    "cla: scatters off by one": (mutant("cla", as_class(ScattersNextColumn)), SQUARE, "gradients_are_right"),
    "cla: names off by one": (mutant("cla", as_class(NamesNextColumn)), SQUARE, "exports_its_delta"),
    "cla: global randomness": (
        mutant("cla", selector_outside_the_state_dict),
        FULL_RANK,
        "is_decided_by_its_generator",
    ),
    "lora: update unscaled": (
        mutant("lora", as_class(UpdateUnscaled)), SQUARE, "adds_to_a_base_that_is_no_matrix",
    ),
    "cla: update without gradient": (
        mutant("cla", as_class(UpdateDetached)), SQUARE, "adds_to_a_base_that_is_no_matrix",
    ),
    "lora: dropout unscaled": (mutant("lora", as_class(DropsUnscaled)), SQUARE, DROPOUT),
    "cla: dropout's complement": (mutant("cla", as_class(KeepsInsteadOfDropping)), SQUARE, DROPOUT),
    "lora: no dropout": (mutant("lora", as_class(NeverDrops)), SQUARE, DROPOUT),
    "lora: dropout on the base": (mutant("lora", in_layer(DropsTheBase)), SQUARE, DROPOUT),
    "lora: dropout in evaluation": (mutant("lora", in_layer(DropsInEvaluation)), SQUARE, DROPOUT),
    "lora: merges itself": (mutant("lora", as_class(WritesIntoTheBase)), SQUARE, "leaves_inputs_alone"),
    "full: holds a stale weight": (
        mutant("full", lambda adapter, target: Stale(target.layer)), SQUARE, "works_transposed",
    ),
    "cla: count of lora": (
        dataclasses.replace(METHODS["cla"], trained=METHODS["lora"].trained),
        SQUARE,
        "trains_what_it_declares",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("method", "case", "promise"), MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_fails_the_suite(method: Method, case: Case, promise: str) -> None:
    with pytest.raises(AssertionError, match=f"{promise}: "):
        run_all(method, case)


@pytest.mark.parametrize("case", [SQUARE, ROOT, FULL_RANK], ids=str)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_unbroken_pass(method: Method, case: Case) -> None:
    run_all(method, case)


def test_the_mutation_machinery_alone_breaks_nothing() -> None:
    run_all(mutant("lora", lambda adapter, config: adapter), SQUARE)
    run_all(mutant("cla", as_class(SelectorAdapter)), SQUARE)

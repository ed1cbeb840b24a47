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
from rayft.methods.lora import LoraAdapter
from tests.contract.methods_contract import CASES, Case, run_all

Build = Callable[[AdapterLinear, MethodConfig, torch.Generator], Adapter]


def mutant(of: str, change: Callable[[Any, MethodConfig], Adapter]) -> Method:
    """A method whose freshly built adapter is spoilt by `change`."""
    original = METHODS[of]

    def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> Adapter:
        return change(original.build(layer, config, generator), config)

    return dataclasses.replace(original, build=build)


def alpha_not_divided(adapter: Any, config: MethodConfig) -> Adapter:
    assert config.alpha is not None
    adapter.scale = config.alpha
    return adapter


def scale_is_squared(adapter: Any, config: MethodConfig) -> Adapter:
    adapter.scale = config.scale**2
    return adapter


def rslora_ignored(adapter: Any, config: MethodConfig) -> Adapter:
    assert config.alpha is not None
    adapter.scale = config.alpha / config.rank
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


def as_class(cls: type[Adapter]) -> Callable[[Any, MethodConfig], Adapter]:
    """Turn a built adapter into one of a broken subclass."""

    def change(adapter: Any, config: MethodConfig) -> Adapter:
        adapter.__class__ = cls
        return adapter

    return change


def starts_swapped(adapter: Any, config: MethodConfig) -> Adapter:
    """A starts at 0 and B at random: the identity too, but not LoRA's."""
    adapter.lora_B.data.fill_(1)
    adapter.lora_A.data.zero_()
    return adapter


def freezes_a(adapter: Any, config: MethodConfig) -> Adapter:
    adapter.lora_A.requires_grad_(False)
    return adapter


def selector_outside_the_state_dict(adapter: Any, config: MethodConfig) -> Adapter:
    adapter.columns = torch.randperm(adapter.inputs)[: config.rank]
    return adapter


SQUARE = Case(outputs=6, inputs=6, rank=3, dtype=torch.float64, alpha=5.0)
ROOT = dataclasses.replace(SQUARE, rslora=True)
FULL_RANK = dataclasses.replace(SQUARE, rank=6)

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
    "cla: count of lora": (
        dataclasses.replace(METHODS["cla"], trained=METHODS["lora"].trained),
        SQUARE,
        "trains_what_it_declares",
    ),
}


@pytest.mark.parametrize(("method", "case", "promise"), MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_fails_the_suite(method: Method, case: Case, promise: str) -> None:
    with pytest.raises(AssertionError, match=f"{promise}: "):
        run_all(method, case)


@pytest.mark.parametrize("case", [SQUARE, ROOT, FULL_RANK, *CASES[:3]], ids=str)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_unbroken_pass(method: Method, case: Case) -> None:
    run_all(method, case)


def test_the_mutation_machinery_alone_breaks_nothing() -> None:
    run_all(mutant("lora", lambda adapter, config: adapter), SQUARE)
    run_all(mutant("cla", as_class(SelectorAdapter)), SQUARE)

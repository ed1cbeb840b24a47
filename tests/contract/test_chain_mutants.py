"""Chains, in-place columns and frozen starts broken on purpose: each must fail at the promise it breaks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rayft.kernels.columns import gather_columns, write_columns
from rayft.methods import METHODS
from rayft.methods.base import Adapter, AdapterLinear, Chain, LoraFactors, Method, MethodConfig
from rayft.methods.c3la import WindowChain, window
from rayft.methods.cla import SelectorAdapter
from rayft.methods.cola import GaussianChain
from rayft.methods.lora import gaussian, kaiming_uniform, zeros
from rayft.methods.paca import ColumnAdapter, ColumnFunction
from tests.contract.methods_contract import CHAIN_CASES, Case, run_all
from tests.contract.test_mutants import SQUARE, Target, as_class, mutant

WRAPS = Case(outputs=7, inputs=5, rank=3, dtype=torch.float64)
"""The second window is inputs 3, 4 and, wrapped, 0."""
SECOND = dataclasses.replace(SQUARE, links=2)
SECOND_ROOT = dataclasses.replace(SECOND, rslora=True)


class WindowOffByOne(WindowChain):
    """Later windows begin one input too late."""

    def advance(self, generator: torch.Generator) -> None:
        link = self.columns.numel() // self.lora_B.shape[1]
        self.begin_link((window(int(self.order[link]), self.lora_B.shape[1], self.inputs) + 1) % self.inputs)


class MovesTheWindowOnly(WindowChain):
    """As the released code: new columns, the old B."""

    def advance(self, generator: torch.Generator) -> None:
        link = self.columns.numel() // self.lora_B.shape[1]
        self.columns = window(int(self.order[link]), self.lora_B.shape[1], self.inputs)


class KeepsTrainingThePast(GaussianChain):
    """The links before are parameters that still train."""

    def advance(self, generator: torch.Generator) -> None:
        kept = self.past_B
        del self.past_B
        self.register_buffer("past_B", None if kept is None else kept.detach())
        super().advance(generator)
        past = self.past_B
        del self.past_B
        self.past_B = nn.Parameter(past)


class DropsThePast(GaussianChain):
    """The next link begins from the base again."""

    def advance(self, generator: torch.Generator) -> None:
        super().advance(generator)
        self.past_A = self.past_B = None


class DropsAPastB(WindowChain):
    """The columns are kept, what was trained on them is not."""

    def advance(self, generator: torch.Generator) -> None:
        super().advance(generator)
        self.past_B = torch.zeros_like(self.past_B)


class ScaleOfAllRanks(GaussianChain):
    """α is divided by k·R instead of R."""

    def advance(self, generator: torch.Generator) -> None:
        links = 1 if self.past_A is None else self.past_A.shape[0] // self.lora_A.shape[0] + 1
        super().advance(generator)
        self.scale *= links / (links + 1)


class StacksInTwoOrders(GaussianChain):
    """New A below the past ones, new B before them."""

    def to_lora(self) -> LoraFactors:
        right = super().to_lora()
        if self.past_B is None:
            return right
        return dataclasses.replace(right, b=torch.cat([self.lora_B.detach(), self.past_B], 1))


class KeepsB(GaussianChain):
    """The next link starts from the B that was trained."""

    def advance(self, generator: torch.Generator) -> None:
        b = self.lora_B.detach().clone()
        super().advance(generator)
        self.lora_B.data.copy_(b)


class GlobalRandomness(GaussianChain):
    """The next A is not the generator's."""

    def advance(self, generator: torch.Generator) -> None:
        self.begin_link(torch.randn_like(self.lora_A))


class RepeatsA(GaussianChain):
    """Each link has the first one's A."""

    def advance(self, generator: torch.Generator) -> None:
        self.begin_link(self.lora_A.detach().clone())


class LastDuplicateWins(WindowChain):
    """W[:, columns] = … where it should add: a column that two links select gets the last one's share."""

    def update(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        b = self.lora_B if self.past_B is None else torch.cat([self.past_B, self.lora_B], 1)
        last = {int(column): at for at, column in enumerate(self.columns)}
        dense = torch.zeros(b.shape[0], self.inputs, dtype=b.dtype)
        for column, at in last.items():
            dense[:, column] = b[:, at]
        return self.scale * functional.linear(functional.dropout(x, dropout), dense)

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        update = self.update(x)
        return update if weight is None else functional.linear(x, weight, bias) + update


class _OverwritingGather(torch.autograd.Function):
    """Gathers columns; backward writes the gradient of each where it should add."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(columns)
        ctx.shape = x.shape
        return x[..., columns]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (columns,) = ctx.saved_tensors
        grad = torch.zeros(ctx.shape, dtype=grads[0].dtype)
        for at, column in enumerate(columns.tolist()):
            grad[..., column] = grads[0][..., at]
        return grad, None


class LastDuplicateGetsTheGradient(WindowChain):
    """The same in the gradient of x alone."""

    def update(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        b = self.lora_B if self.past_B is None else torch.cat([self.past_B, self.lora_B], 1)
        xs = _OverwritingGather.apply(x, self.columns)
        return self.scale * functional.linear(functional.dropout(xs, dropout), b)

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        update = self.update(x)
        return update if weight is None else functional.linear(x, weight, bias) + update


class ExportsP(ColumnAdapter):
    """B = P/s instead of (P − W0[:, S])/s."""

    def to_lora(self) -> LoraFactors:
        right = super().to_lora()
        return dataclasses.replace(right, b=self.trained_columns.detach() / self.scale)


class DividesTwice(ColumnAdapter):
    """B = (P − W0[:, S])/s²."""

    def to_lora(self) -> LoraFactors:
        right = super().to_lora()
        return dataclasses.replace(right, b=right.b / self.scale)


class NeverRestores(ColumnAdapter):
    """What was trained stays in the base."""

    def restore(self, weight: torch.Tensor) -> None:
        """Do nothing."""


class RestoresTheTrained(ColumnAdapter):
    """Writes P back instead of what was there."""

    def restore(self, weight: torch.Tensor) -> None:
        write_columns(weight.data, self.columns, self.trained_columns.detach())


class NeverWrites(ColumnAdapter):
    """P trains, and W0 computes."""

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if weight is None:
            return super().forward(x, weight, bias)
        return ColumnFunction.apply(x, weight, bias, self.columns, self.trained_columns)


class GathersTheNext(ColumnAdapter):
    """The gradient of each column comes from the next input."""

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if weight is None:
            return super().forward(x, weight, bias)
        write_columns(weight.data, self.columns, self.trained_columns.detach())
        shifted = (self.columns + 1) % self.inputs
        return ColumnFunction.apply(x, weight, bias, shifted, self.trained_columns)


def reads_the_stored_layout(adapter: Any, target: Target) -> Adapter:
    """W0[:, S] of the weight as it is stored, which a transposed layer stores the other way."""
    start = gather_columns(target.layer.weight.detach(), adapter.columns)
    return ColumnAdapter(adapter.columns, start, adapter.inputs, adapter.scale)


def trains_a(adapter: Any, target: Target) -> Adapter:
    adapter.lora_A.requires_grad_(True)
    return adapter


def start(of: str, make: Any) -> Method:
    """A method whose first A is another one: `make(rank, inputs, generator)`."""

    def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> Adapter:
        adapter: Any = METHODS[of].build(layer, config, generator)
        adapter.lora_A.data.copy_(make(config.rank, layer.in_features, generator))
        return adapter

    return dataclasses.replace(METHODS[of], build=build)


def selecting(of: str, choose: Any) -> Method:
    """A selector method with other columns: `choose(rank, inputs, generator)`."""

    def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> Adapter:
        columns = choose(config.rank, layer.in_features, generator)
        return SelectorAdapter(columns, zeros(layer, config.rank), layer.in_features, config.scale)

    return dataclasses.replace(METHODS[of], build=build)


def ordering(of: str, choose: Any) -> Method:
    """A chain of windows in another order: `choose(windows, generator)`."""

    def build(layer: AdapterLinear, config: MethodConfig, generator: torch.Generator) -> Adapter:
        order = choose(-(-layer.in_features // config.rank), generator)
        return WindowChain(order, zeros(layer, config.rank), layer.in_features, config.scale)

    return dataclasses.replace(METHODS[of], build=build)


def one_window(rank: int, inputs: int, generator: torch.Generator) -> torch.Tensor:
    offset = int(torch.randint(inputs - rank + 1, (1,), generator=generator))
    return torch.arange(offset, offset + rank)


def with_replacement(windows: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(windows, (windows,), generator=generator)


def same_for_every_seed(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def wider(rank: int, inputs: int, generator: torch.Generator) -> torch.Tensor:
    return gaussian(rank, inputs, generator) * 3**0.5


def too_many_links(method: Method) -> Method:
    assert isinstance(method, Chain)
    limit = method.most_links
    assert limit is not None
    return dataclasses.replace(method, most_links=lambda shape, rank: limit(shape, rank) + 1)


MUTANTS: dict[str, tuple[Method, Case, str]] = {
    "c3la: window off by one": (mutant("c3la", as_class(WindowOffByOne)), SQUARE, "draws_its_a"),
    "c3la: moves the window only": (
        mutant("c3la", as_class(MovesTheWindowOnly)), SECOND, "exports_its_delta",
    ),
    "c3la: past B dropped": (mutant("c3la", as_class(DropsAPastB)), SQUARE, "links_stack"),
    "c3la: duplicates overwritten": (mutant("c3la", as_class(LastDuplicateWins)), WRAPS, "links_stack"),
    "c3la: duplicates overwritten in dx": (
        mutant("c3la", as_class(LastDuplicateGetsTheGradient)), WRAPS, "links_stack",
    ),
    "c3la: one link too many": (too_many_links(METHODS["c3la"]), SQUARE, "refuses_too_long_a_chain"),
    "rc3la: with replacement": (ordering("rc3la", with_replacement), SQUARE, "draws_its_a"),
    "rc3la: one order for all seeds": (ordering("rc3la", same_for_every_seed), SQUARE, "draws_its_a"),
    "rc3la: not shuffled": (ordering("rc3la", lambda n, _: torch.arange(n)), SQUARE, "draws_its_a"),
    "rcla: one window": (selecting("rcla", one_window), SQUARE, "draws_its_a"),
    "rcla: one choice for all seeds": (
        selecting("rcla", lambda r, i, g: same_for_every_seed(i, g)[:r]), SQUARE, "draws_its_a",
    ),
    "rcla: with replacement": (
        selecting("rcla", lambda r, i, g: torch.randint(i, (r,), generator=g)), SQUARE, "draws_its_a",
    ),
    "cola: past link trains on": (mutant("cola", as_class(KeepsTrainingThePast)), SQUARE, "links_stack"),
    "cola: past link trains on, at the second": (
        mutant("cola", as_class(KeepsTrainingThePast)), SECOND, "trains_what_it_declares",
    ),
    "cola: past dropped": (mutant("cola", as_class(DropsThePast)), SQUARE, "links_stack"),
    "cola: scale of all ranks": (mutant("cola", as_class(ScaleOfAllRanks)), SQUARE, "links_stack"),
    "cola: scale of all ranks, rslora": (
        mutant("cola", as_class(ScaleOfAllRanks)), SECOND_ROOT, "exports_its_delta",
    ),
    "cola: stacked in two orders": (mutant("cola", as_class(StacksInTwoOrders)), SQUARE, "links_stack"),
    "cola: B kept": (mutant("cola", as_class(KeepsB)), SQUARE, "links_stack"),
    "cola: global randomness": (
        mutant("cola", as_class(GlobalRandomness)), SECOND, "is_decided_by_its_generator",
    ),
    "cola: A repeated": (mutant("cola", as_class(RepeatsA)), SQUARE, "draws_its_a"),
    "cola: Kaiming-uniform": (start("cola", kaiming_uniform), SQUARE, "draws_its_a"),
    "rac: too wide": (start("rac", wider), SQUARE, "draws_its_a"),
    "rac: A trained": (mutant("rac", trains_a), SQUARE, "trains_what_it_declares"),
    "asym: A trained": (mutant("asym", trains_a), SQUARE, "trains_what_it_declares"),
    "asym: rows not orthonormal": (start("asym", gaussian), SQUARE, "draws_its_a"),
    "lora: Gaussian": (start("lora", gaussian), SQUARE, "draws_its_a"),
    "paca: exports P": (mutant("paca", as_class(ExportsP)), SQUARE, "starts_with_b_zero"),
    "paca: divides by s twice": (mutant("paca", as_class(DividesTwice)), SQUARE, "computes_w_plus_delta"),
    "paca: never writes": (mutant("paca", as_class(NeverWrites)), SQUARE, "computes_w_plus_delta"),
    "paca: gathers off by one": (mutant("paca", as_class(GathersTheNext)), SQUARE, "gradients_are_right"),
    "paca: not restored": (mutant("paca", as_class(NeverRestores)), SQUARE, "restores_its_base"),
    "paca: restored to P": (mutant("paca", as_class(RestoresTheTrained)), SQUARE, "restores_its_base"),
    "paca: reads the stored layout": (mutant("paca", reads_the_stored_layout), SQUARE, "works_transposed"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "case", "promise"), MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_fails_the_suite(method: Method, case: Case, promise: str) -> None:
    with pytest.raises(AssertionError, match=f"{promise}: "):
        run_all(method, case)


@pytest.mark.parametrize("case", [SECOND, WRAPS, CHAIN_CASES[0]], ids=str)
@pytest.mark.parametrize("name", ["cola", "rac", "c3la", "rc3la"])
def test_the_unbroken_pass(name: str, case: Case) -> None:
    run_all(METHODS[name], case)


def test_the_mutation_machinery_alone_breaks_nothing() -> None:
    run_all(mutant("c3la", as_class(WindowChain)), SECOND)
    run_all(mutant("cola", as_class(GaussianChain)), SECOND)
    run_all(mutant("paca", as_class(ColumnAdapter)), SQUARE)
    run_all(ordering("rc3la", lambda n, g: torch.randperm(n, generator=g)), SECOND)
    run_all(selecting("rcla", lambda r, i, g: torch.randperm(i, generator=g)[:r]), SQUARE)
    run_all(start("rac", gaussian), SECOND)

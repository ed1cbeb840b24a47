"""Promises of methods, and the layers on which they are checked.

A promise says which methods make it, by capability, and over which cases it is checked. Cases vary a layer's
size, its dtype and, for chains, the link. Every promise is checked on every size and every dtype for every
method that makes it. Which dtype goes with which size rotates from promise to promise and from method to
method (a Latin square), so that all pairs occur, but not all combinations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rayft.methods.base import AdapterLinear, Chain, ChainConfig, InPlace, LayerShape, Method, MethodConfig
from rayft.numerics import assert_close, generator

TOKENS = 6


@dataclass(frozen=True)
class Case:
    """One layer on which a method is checked; a chain's adapter is at its link number `links`."""

    outputs: int
    inputs: int
    rank: int
    dtype: torch.dtype
    alpha: float = 5.0
    rslora: bool = False
    bias: bool = True
    links: int = 1

    def __str__(self) -> str:
        kind = ("-rslora" if self.rslora else "") + ("" if self.bias else "-nobias")
        link = f"-link{self.links}" if self.links > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.outputs}x{self.inputs}-r{self.rank}-{dtype}{kind}{link}"

    @property
    def shape(self) -> LayerShape:
        return LayerShape(outputs=self.outputs, inputs=self.inputs)

    def config(self, method: Method) -> MethodConfig:
        chain = ChainConfig(links=self.links) if isinstance(method, Chain) else None
        return MethodConfig(
            name=method.name, rank=self.rank, alpha=self.alpha, rslora=self.rslora, chain=chain
        )

    @property
    def scale(self) -> float:
        """s by its definition, independent of the code under test."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


SIZES: list[tuple[int, int, int, dict[str, Any]]] = [
    (7, 5, 3, {}),
    (5, 7, 5, {}),
    (3, 1, 1, {}),
    (19, 16, 4, {"rslora": True}),
    (9, 9, 2, {"bias": False}),
]
# At 7x5 and 9x9 the last window of a selector chain wraps onto columns of the first one.
LATER_LINKS: list[tuple[int, int, int, dict[str, Any]]] = [
    (7, 5, 3, {"links": 2}),
    (19, 16, 4, {"links": 3, "rslora": True}),
    (9, 9, 2, {"links": 5, "bias": False}),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def rotated(sizes: list[tuple[int, int, int, dict[str, Any]]], turn: int = 0) -> list[Case]:
    """Return a case for each size, with a dtype that `turn` rotates."""
    return [
        Case(o, i, r, DTYPES[(number + turn) % len(DTYPES)], **extra)
        for number, (o, i, r, extra) in enumerate(sizes)
    ]


CASES = rotated(SIZES)
CHAIN_CASES = rotated(LATER_LINKS)


def everywhere(method: Method, turn: int) -> list[Case]:
    """Return a case for each size, and for chains one for each later link."""
    return rotated(SIZES, turn) + (rotated(LATER_LINKS, turn) if chains(method) else [])


def first_links(method: Method, turn: int) -> list[Case]:
    """Return a case for each size, of a promise about the first link, or one that begins links itself."""
    return rotated(SIZES, turn)


def later_links(method: Method, turn: int) -> list[Case]:
    """Return a case for each size at which a chain can begin another link: the first link and a later one."""
    return [case for case in rotated(SIZES, turn) if method.max_links(case.shape, case.rank) > 1]


def sizes(method: Method, turn: int) -> list[Case]:
    """Return a case for each size, of a promise to which the dtype does not matter."""
    return [replace(case, dtype=torch.float32) for case in CASES]


def dtypes(method: Method, turn: int) -> list[Case]:
    """Return a case for each dtype, of a promise that chooses its own size."""
    return [replace(CASES[0], dtype=dtype) for dtype in DTYPES]


def once(method: Method, turn: int) -> list[Case]:
    """Return one case, of a promise to refuse something."""
    return CASES[:1]


def every(method: Method) -> bool:
    return True


def exports_lora(method: Method) -> bool:
    return method.exports_lora


def chains(method: Method) -> bool:
    return isinstance(method, Chain)


def adds_to_the_base(method: Method) -> bool:
    """Whether it leaves the base's weights alone while it trains."""
    return method.shares_base and not isinstance(method, InPlace)


def no(capability: Callable[[Method], bool]) -> Callable[[Method], bool]:
    return lambda method: not capability(method)


@dataclass(frozen=True)
class Promise:
    """Something that methods promise, and its check, which raises AssertionError."""

    check: Callable[[Method, Case], None]
    of: Callable[[Method], bool]
    """Whether a method makes it."""
    over: Callable[[Method, int], list[Case]]
    """The cases on which it is checked for a method; the number rotates dtypes."""

    @property
    def name(self) -> str:
        return self.check.__name__

    def __call__(self, method: Method, case: Case) -> None:
        self.check(method, case)


def promise(
    of: Callable[[Method], bool] = every, over: Callable[[Method, int], list[Case]] = everywhere
) -> Callable[[Callable[[Method, Case], None]], Promise]:
    """Declare the check of a promise."""
    return lambda check: Promise(check, of, over)


def checks_of(
    promises: Iterable[Promise], methods: Iterable[Method]
) -> Iterator[tuple[Method, Case, Promise]]:
    """Pair each method with each promise that it makes, on that promise's cases."""
    promises = list(promises)
    for first, method in enumerate(methods):
        for second, made in enumerate(promises):
            if made.of(method):
                for case in made.over(method, first + second):
                    yield method, case, made


class Transposed(nn.Module):
    """A layer that stores its weight I × O, as GPT-2's `Conv1D` does."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(plain.weight.detach().t().clone(), requires_grad=False)
        self.bias = plain.bias


class Quantised(nn.Linear):
    """A layer whose weight holds codes, so that it can't be read, and which computes its own product."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        self.weight = nn.Parameter(torch.zeros_like(plain.weight, dtype=torch.int8), requires_grad=False)
        self.bias = plain.bias
        self.plain = [plain]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.plain[0].weight, self.bias)


def linear(case: Case) -> nn.Linear:
    """A frozen base layer with random weights."""
    base = nn.Linear(case.inputs, case.outputs, bias=case.bias, dtype=torch.float64)
    for parameter in base.parameters():
        parameter.data.normal_(generator=generator("base", str(case), tuple(parameter.shape)))
    return base.to(case.dtype).requires_grad_(False)


def built(method: Method, case: Case, seed: int = 0, base: nn.Module | None = None) -> AdapterLinear:
    """A layer with an adapter whose last link is fresh; the links before have been trained."""
    layer = AdapterLinear(linear(case) if base is None else base, dtype=case.dtype)
    layer.adapter = method.build(layer, case.config(method), generator("adapter", seed))
    for link in range(1, case.links if isinstance(method, Chain) else 1):
        next_link(perturb(layer, link), link, seed)
    return layer


def next_link(layer: AdapterLinear, link: int, seed: int = 0) -> None:
    """Begin a chain's link number `link`, counted from 0."""
    assert layer.adapter is not None
    layer.adapter.advance(generator("adapter", seed, "link", link))


def perturb(layer: AdapterLinear, *step: int) -> AdapterLinear:
    """Stand in for training: move every parameter that trains."""
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            move = torch.empty(parameter.shape, dtype=torch.float64)
            parameter.data += move.normal_(generator=generator("step", name, *step)).to(parameter.dtype)
    return layer


def trained_layer(method: Method, case: Case) -> AdapterLinear:
    """A layer whose adapter does something."""
    return perturb(built(method, case))


def inputs(case: Case, *lead: int) -> torch.Tensor:
    """Random inputs (…, I)."""
    x = torch.empty(*(lead or (TOKENS,)), case.inputs, dtype=torch.float64)
    return x.normal_(generator=generator("x", str(case))).to(case.dtype)


def delta(layer: AdapterLinear, case: Case) -> torch.Tensor:
    """ΔW in float64, by the adapter's own account of itself."""
    exact = copy.deepcopy(layer).double()
    assert exact.adapter is not None
    return exact.adapter.delta(linear(case).double().weight).detach()


def exact_output(layer: AdapterLinear, case: Case, x: torch.Tensor) -> torch.Tensor:
    """linear(x, W0 + ΔW) in float64."""
    base = linear(case).double()
    return functional.linear(x.double(), base.weight + delta(layer, case), base.bias)


def loss(y: torch.Tensor) -> torch.Tensor:
    """A scalar with a different weight on each output."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    return (y * weights.to(y.dtype)).sum()


def close(actual: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    # Four roundings: the base's product, x·Aᵀ, its product with B, and their sum.
    assert_close(actual, expected, case.dtype, case.inputs + case.rank * case.links + TOKENS, depth=4)


def close_gradient(actual: torch.Tensor, expected: torch.Tensor | None, case: Case) -> None:
    assert actual.grad is not None
    assert expected is not None
    assert actual.grad.dtype == case.dtype
    length = case.inputs + case.outputs + case.rank * case.links + TOKENS
    assert_close(actual.grad, expected, case.dtype, length, depth=4)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}

"""Layers to try a method on: odd shapes, three dtypes, fresh or trained, at the first link or a later one."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from rayft.methods.base import AdapterLinear, Chain, ChainConfig, LayerShape, Method, MethodConfig
from rayft.numerics import assert_close, generator

TOKENS = 6


@dataclass(frozen=True)
class Case:
    """One layer that a method is tried on; a chain's adapter is at its link number `links`."""

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
        """s by the definition, not by the code under test."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


SIZES = [
    (7, 5, 3, {}),
    (5, 7, 5, {}),
    (3, 1, 1, {}),
    (19, 16, 4, {"rslora": True}),
    (9, 9, 2, {"bias": False}),
]
# At 7x5 and 9x9 the last window of a selector chain wraps onto columns of the first one.
LATER_LINKS = [
    (7, 5, 3, {"links": 2}),
    (19, 16, 4, {"links": 3, "rslora": True}),
    (9, 9, 2, {"links": 5, "bias": False}),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CASES = [Case(o, i, r, dtype, **extra) for o, i, r, extra in SIZES for dtype in DTYPES]
CHAIN_CASES = [Case(o, i, r, dtype, **extra) for o, i, r, extra in LATER_LINKS for dtype in DTYPES]


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

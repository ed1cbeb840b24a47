"""What methods promise about their start, by the paper's definition, and about the links of a chain."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from rayft.errors import MethodError, TargetError
from rayft.methods.base import Adapter, Chain, LoraFactors, Method
from rayft.numerics import assert_close, generator
from tests.contract.cases import (
    TOKENS,
    Case,
    built,
    chains,
    close,
    close_gradient,
    dtypes,
    first_links,
    inputs,
    linear,
    loss,
    next_link,
    no,
    once,
    perturb,
    promise,
    sizes,
    trainable,
)

DEVIATIONS = 5
"""Standard deviations by which a statistic of a correct start may be off; the seeds are fixed."""

Draw = Callable[[int, int], LoraFactors]
"""The factors of a fresh adapter: seed, links → all of them."""


@promise(of=lambda method: method.name in STARTS, over=dtypes)
def draws_its_a(method: Method, case: Case) -> None:
    """A starts as its paper says: checked by name, on a layer that is large enough for statistics."""
    wide = Case(outputs=48, inputs=100, rank=24, dtype=case.dtype)

    def draw(seed: int, links: int = 1) -> LoraFactors:
        layer = built(method, wide, seed)
        for link in range(1, links):
            next_link(layer, link, seed)
        assert layer.adapter is not None
        return layer.adapter.to_lora()

    STARTS[method.name](draw, wide)


def _uniform(draw: Draw, case: Case) -> None:
    bound = 1 / math.sqrt(case.inputs)
    a = draw(0, 1).a.double()
    assert a.abs().max() <= bound * (1 + torch.finfo(case.dtype).eps), "A leaves ±1/√I"
    # Of a uniform z with variance 1: Var(z²) = 0.8, E z⁴ = 1.8, Var(z⁴) = 5.76.
    _moments(a * math.sqrt(3) / bound, 0.8, 1.8, 5.76)
    assert not torch.equal(a, draw(1, 1).a.double()), "A is the same for every seed"


def _gaussian(draw: Draw, case: Case) -> None:
    a = draw(0, 3).a.double()
    links = a.split(case.rank)
    for link in links:
        # Of a Gaussian z with variance 1: Var(z²) = 2, E z⁴ = 3, Var(z⁴) = 96.
        _moments(link * math.sqrt(3 * case.inputs), 2.0, 3.0, 96.0)
    assert not torch.equal(links[0], links[1]), "the second link has the first one's A"
    assert not torch.equal(a, draw(1, 3).a.double()), "A is the same for every seed"


def _moments(z: torch.Tensor, square: float, fourth: float, of_fourth: float) -> None:
    """Check mean, variance and fourth moment of draws that should have variance 1."""
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, square), (4, fourth, of_fourth)):
        off = abs(z.pow(power).mean().item() - mean)
        allowed = DEVIATIONS * math.sqrt(variance / z.numel())
        assert off < allowed, f"the mean of z^{power} is off by {off:.3g}, chance explains {allowed:.3g}"


def _orthonormal(draw: Draw, case: Case) -> None:
    a = draw(0, 1).a.double()
    # Each entry of A is rounded once, and enters a product twice.
    assert_close(a @ a.t(), torch.eye(case.rank).double(), case.dtype, case.inputs, depth=2)
    assert not torch.equal(a, draw(1, 1).a.double()), "A is the same for every seed"


def _first_columns(draw: Draw, case: Case) -> None:
    assert draw(0, 1).columns == tuple(range(case.rank))


def _random_columns(draw: Draw, case: Case) -> None:
    first, second = draw(0, 1).columns, draw(1, 1).columns
    assert first is not None
    assert len(set(first)) == case.rank, "a column is selected twice"
    assert first != second, "the columns are the same for every seed"
    assert max(first) - min(first) >= case.rank, "the columns are one window"


def _windows(case: Case) -> list[tuple[int, ...]]:
    """c³LA's windows by the pseudocode: link j (from 1) selects (r(j−1) + i) mod m."""
    count = math.ceil(case.inputs / case.rank)
    return [
        tuple((case.rank * (j - 1) + i) % case.inputs for i in range(case.rank)) for j in range(1, count + 1)
    ]


def _selected(draw: Draw, case: Case, seed: int) -> list[tuple[int, ...]]:
    columns = draw(seed, len(_windows(case))).columns
    assert columns is not None
    return [tuple(columns[at : at + case.rank]) for at in range(0, len(columns), case.rank)]


def _windows_in_order(draw: Draw, case: Case) -> None:
    selected = _selected(draw, case, 0)
    assert selected == _windows(case), f"the links select {selected}"


def _windows_shuffled(draw: Draw, case: Case) -> None:
    orders = [_selected(draw, case, seed) for seed in range(4)]
    for order in orders:
        assert sorted(order) == sorted(_windows(case)), "no permutation of the windows"
    assert any(order != orders[0] for order in orders), "the order is the same for every seed"
    assert any(order != _windows(case) for order in orders), "the windows are not shuffled"


STARTS: dict[str, Callable[[Draw, Case], None]] = {
    "lora": _uniform,
    "lora_plus": _uniform,
    "asym": _orthonormal,
    "cola": _gaussian,
    "rac": _gaussian,
    "paca": _random_columns,
    "cla": _first_columns,
    "rcla": _random_columns,
    "c3la": _windows_in_order,
    "rc3la": _windows_shuffled,
}


@promise(of=lambda method: isinstance(method, Chain) and method.most_links is not None, over=sizes)
def refuses_too_long_a_chain(method: Method, case: Case) -> None:
    """The error names the module and the most links, and a chain of so many can be built."""
    most = int(method.max_links(case.shape, case.rank))
    method.check(case.shape, case.rank, "some.module", links=most)
    expected = (
        rf"a chain of {most + 1} links .* than some\.module .* '{method.name}': use at most {most} links"
    )
    with pytest.raises(TargetError, match=expected):
        method.check(case.shape, case.rank, "some.module", links=most + 1)
    try:
        built(method, dataclasses.replace(case, links=most))
    except IndexError as error:
        raise AssertionError(f"it does not hold the {most} links that it says") from error


@promise(of=no(chains), over=once)
def has_no_next_link(method: Method, case: Case) -> None:
    """A method that is no chain refuses to begin a link."""
    adapter = built(method, case).adapter
    assert adapter is not None
    with pytest.raises(MethodError, match="is no chain, so it has no next link"):
        adapter.advance(generator("next"))


@promise(of=chains, over=first_links)
def links_stack(method: Method, case: Case) -> None:
    """layer(x) = linear(x, W0 + Σ_j s·B_j·A_j) at every link, with the factors at the end of each link.

    The factors are copied before the next link begins, independent of how the adapter stacks them.
    """
    layer = built(method, dataclasses.replace(case, links=1))
    assert layer.adapter is not None
    most = int(min(5, method.max_links(case.shape, case.rank)))
    base = linear(dataclasses.replace(case, links=1)).double()
    weight, x = base.weight.detach().clone(), inputs(case)
    for link in range(most):
        at = dataclasses.replace(case, links=link + 1)
        if link:
            _begin(layer.adapter, lambda link=link: next_link(layer, link), case.rank)
        fresh = functional.linear(x.double(), weight, base.bias)
        close(layer(x), fresh, at)
        perturb(layer, link)
        a, b = _last_link(layer.adapter, case.rank)
        weight += case.scale * b @ a
        count = sum(parameter.numel() for parameter in trainable(layer).values())
        assert count == method.trained(case.shape, case.rank), f"{count} numbers train at link {link + 1}"
        mine = inputs(case).requires_grad_(True)
        exact = mine.detach().double().requires_grad_(True)
        y, expected = layer(mine), functional.linear(exact, weight, base.bias)
        close(y, expected, at)
        loss(y).backward()
        close_gradient(mine, torch.autograd.grad(loss(expected), exact)[0], at)
        factors = layer.adapter.to_lora()
        assert factors.rank == case.rank * (link + 1)
        total = case.scale * factors.b.double() @ factors.a.double()
        own = base.weight.detach() + total
        assert_close(own, weight, torch.float64, factors.rank + TOKENS, depth=4)


def _begin(adapter: Adapter, advance: Callable[[], None], rank: int) -> None:
    """Begin a link, and check that the trained factors stay, bit by bit, and that the new B is 0."""
    before = adapter.to_lora()
    a, b = before.a.clone(), before.b.clone()
    advance()
    after = adapter.to_lora()
    assert torch.equal(after.a[:-rank], a), "a past A has changed"
    assert torch.equal(after.b[:, :-rank], b), "a past B has changed"
    assert not after.b[:, -rank:].any(), "the next B does not start at 0"
    assert after.a[-rank:].any(), "the next A starts at 0, so nothing would ever train"


def _last_link(adapter: Adapter, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of the link that trains, in float64, and check that B is a parameter that trains."""
    factors = adapter.to_lora()
    a, b = factors.a[-rank:], factors.b[:, -rank:]
    assert any(p.shape == b.shape and torch.equal(p, b) for p in trainable(adapter).values()), (
        "what trains is not the last link"
    )
    return a.double(), b.double()

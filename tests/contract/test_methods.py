"""Every method in the registry keeps its promises, on odd shapes and in three dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from rayft.methods import METHODS
from rayft.methods.base import Chain, InPlace, LayerShape, Method
from tests.contract.cases import DTYPES, SIZES, Quantised, checks_of, everywhere, first_links, linear
from tests.contract.methods_contract import PROMISES, TOKENS, Case, Promise, built, inputs

CHECKS = [
    pytest.param(method, case, made, id=f"{method.name}-{case}-{made.name}")
    for method, case, made in checks_of(PROMISES, METHODS.values())
]


@pytest.mark.parametrize(("method", "case", "made"), CHECKS)
def test_a_method_keeps_its_promises(method: Method, case: Case, made: Promise) -> None:
    made(method, case)


def test_each_promise_is_checked_on_every_size_and_dtype() -> None:
    for made in PROMISES:
        found = [case for _, case, checked in checks_of(PROMISES, METHODS.values()) if checked is made]
        assert found, f"no method makes the promise {made.name}"
        if made.over in (everywhere, first_links):
            pairs = {(case.inputs, case.dtype) for case in found}
            assert len(pairs) == len(SIZES) * len(DTYPES), f"{made.name} is checked on {pairs} only"


def test_registry_keys_are_the_methods_names() -> None:
    assert all(name == method.name for name, method in METHODS.items())


# Of a layer with O outputs and I inputs at rank R, by DESIGN's table; of a chain, in one link. The tables of
# this file need no line for a new method: its count is one of the promises.
TRAINED: dict[str, Callable[[int, int, int], int]] = {
    "full": lambda o, i, r: o * i,
    "lora": lambda o, i, r: r * (i + o),
    "lora_plus": lambda o, i, r: r * (i + o),
    "asym": lambda o, i, r: r * o,
    "cola": lambda o, i, r: r * (i + o),
    "rac": lambda o, i, r: r * o,
    "paca": lambda o, i, r: r * o,
    "cla": lambda o, i, r: r * o,
    "rcla": lambda o, i, r: r * o,
    "c3la": lambda o, i, r: r * o,
    "rc3la": lambda o, i, r: r * o,
}
MAX_RANK = {"full": None, "paca": 48, "cla": 48, "rcla": 48, "c3la": 48, "rc3la": 48}
"""On a layer of 24 × 48: that of a selector is its inputs, of a product of factors the smaller side."""


@pytest.mark.parametrize("name", TRAINED)
def test_counts_are_the_tables(name: str) -> None:
    shape, method = LayerShape(outputs=24, inputs=48), METHODS[name]
    for rank in (1, 5):
        assert method.trained(shape, rank) == TRAINED[name](24, 48, rank)
        assert method.stored(shape, rank, 3) == 3 * TRAINED[name](24, 48, rank)
    limit = MAX_RANK.get(name, 24)
    if limit is not None:
        assert method.max_rank(shape) == limit


def test_the_methods_are_of_the_kinds_in_the_table() -> None:
    def names(of: Callable[[Method], bool]) -> set[str]:
        return {name for name in TRAINED if of(METHODS[name])}

    def users(setting: str) -> set[str]:
        return names(lambda method: setting not in method.ignored())

    shape = LayerShape(outputs=24, inputs=48)
    assert names(lambda method: isinstance(method, Chain)) == {"cola", "rac", "c3la", "rc3la"}
    assert names(lambda method: 1 < method.max_links(shape, 5) < math.inf) == {"c3la", "rc3la"}
    assert names(lambda method: isinstance(method, InPlace)) == {"paca"}
    assert users("chain") == {"cola", "rac", "c3la", "rc3la"}
    assert users("lr_ratio") == {"lora_plus"}
    assert users("dropout") == TRAINED.keys() - {"full", "paca"}
    assert users("options") == set()
    assert users("targets") == TRAINED.keys() - {"full"}
    assert names(lambda method: not method.shares_base) == {"full"}
    assert (
        names(lambda method: not method.exports_lora) == names(lambda method: method.saves_model) == {"full"}
    )
    assert names(lambda method: method.fixed_factors() is None) == {"lora", "lora_plus"}


def saved_bytes(name: str, dtype: torch.dtype, links: int = 1, *, matrix: bool = True) -> int:
    """Bytes a layer keeps for backward, apart from its parameters, buffers and base."""
    case = Case(outputs=24, inputs=48, rank=4, dtype=dtype, links=links)
    base = None if matrix else Quantised(linear(case))
    layer = built(METHODS[name], case, base=base)
    own = [*layer.state_dict(keep_vars=True).values(), *(base.plain[0].parameters() if base else ())]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # x is made by an operation, as in a model: a leaf would be alive anyway.
    x = inputs(case).requires_grad_(True) * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(kept.values())


# Numbers a token on 48 inputs at rank 4: x where A trains, and what A makes of it (a chain's last link's A).
SAVED = {"full": 48, "lora": 48 + 4, "lora_plus": 48 + 4, "cola": 48 + 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_what_is_saved_for_backward(name: str, dtype: torch.dtype) -> None:
    expected = TOKENS * SAVED.get(name, 4) * dtype.itemsize
    assert saved_bytes(name, dtype) == expected
    if isinstance(METHODS[name], Chain):
        assert saved_bytes(name, dtype, links=3) == expected
    if METHODS[name].shares_base and not isinstance(METHODS[name], InPlace):
        links = 3 if isinstance(METHODS[name], Chain) else 1
        assert saved_bytes(name, dtype, links, matrix=False) == expected


@pytest.mark.parametrize("name", sorted(TRAINED.keys() - {"full"}))
def test_second_derivatives_are_refused_not_wrong(name: str) -> None:
    case = Case(outputs=4, inputs=4, rank=2, dtype=torch.float64)
    layer, x = built(METHODS[name], case), inputs(case).requires_grad_(True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()

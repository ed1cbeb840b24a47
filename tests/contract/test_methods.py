"""Every method in the registry keeps every promise, on odd shapes and in three dtypes."""

from __future__ import annotations

import pytest
import torch

from rayft.methods import METHODS
from rayft.methods.base import Method
from tests.contract.methods_contract import CASES, CHECKS, TOKENS, Case, Check, built, inputs


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_promise(method: Method, case: Case, check: Check) -> None:
    check(method, case)


def test_registry_keys_are_the_methods_names() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert {"full", "lora", "cla"} <= METHODS.keys()


def saved_numbers(name: str) -> int:
    """Numbers a layer keeps for backward, apart from its parameters, buffers and base."""
    case = Case(outputs=24, inputs=48, rank=4, dtype=torch.float32)
    layer = built(METHODS[name], case)
    known = {tensor.untyped_storage().data_ptr() for tensor in layer.state_dict(keep_vars=True).values()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    # x is made by an operation, as in a model: a leaf would be alive anyway.
    x = inputs(case).requires_grad_(True) * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def test_cla_saves_r_numbers_a_token() -> None:
    assert saved_numbers("cla") == TOKENS * 4


def test_lora_saves_its_input_and_r_numbers_a_token() -> None:
    assert saved_numbers("lora") == TOKENS * (48 + 4)


@pytest.mark.parametrize("name", ["lora", "cla"])
def test_second_derivatives_are_refused_not_wrong(name: str) -> None:
    case = Case(outputs=4, inputs=4, rank=2, dtype=torch.float64)
    layer, x = built(METHODS[name], case), inputs(case).requires_grad_(True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()

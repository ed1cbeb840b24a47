"""What fine-tuning methods promise: one function for each promise, raising AssertionError.

`run_all(method, case)` checks all promises that a method makes. test_methods.py does so over the registry,
test_mutants.py over methods that are broken on purpose, and tests/docs over the methods of the
documentation. Promises about the base are in base_contract.py, those about starts and chains in
chains_contract.py.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import MethodError, TargetError
from rayft.methods.base import AdapterLinear, Chain, InPlace, LoraFactors, Method
from rayft.methods.lora import LoraAdapter
from tests.contract.base_contract import (
    adds_to_a_base_that_is_no_matrix,
    drops_inputs_of_the_update_only,
    drops_nothing_of_past_links,
    refuses_a_base_that_is_no_matrix,
    restores_its_base,
    works_transposed,
)
from tests.contract.cases import (
    CASES,
    CHAIN_CASES,
    TOKENS,
    Case,
    Promise,
    built,
    close,
    close_gradient,
    exact_output,
    exports_lora,
    first_links,
    inputs,
    linear,
    loss,
    no,
    once,
    perturb,
    promise,
    sizes,
    trainable,
    trained_layer,
)
from tests.contract.chains_contract import (
    draws_its_a,
    has_no_next_link,
    links_stack,
    refuses_too_long_a_chain,
)

__all__ = [
    "CASES", "CHAIN_CASES", "PROMISES", "TOKENS", "Case", "Promise", "built", "inputs", "perturb", "run_all",
]  # fmt: skip


@promise(over=first_links)
def starts_as_identity(method: Method, case: Case) -> None:
    case = dataclasses.replace(case, links=1)
    layer, x = built(method, case), inputs(case)
    expected = functional.linear(x, *_base(case))
    assert torch.equal(layer(x), expected), "the fresh layer is not its base"


@promise(of=exports_lora, over=first_links)
def starts_with_b_zero(method: Method, case: Case) -> None:
    adapter = built(method, dataclasses.replace(case, links=1)).adapter
    assert adapter is not None
    factors = adapter.to_lora()
    assert not factors.b.any(), "B does not start at 0"
    assert factors.a.any(), "A starts at 0, so nothing would ever train"


@promise()
def computes_w_plus_delta(method: Method, case: Case) -> None:
    layer, x = trained_layer(method, case), inputs(case)
    y = layer(x)
    assert y.dtype == case.dtype, f"{case.dtype} went in and {y.dtype} came out"
    assert not torch.equal(y, functional.linear(x, *_base(case))), "the trained adapter does nothing"
    close(y, exact_output(layer, case, x), case)


@promise()
def keeps_leading_shape(method: Method, case: Case) -> None:
    layer = trained_layer(method, case)
    for lead in ((2, 3), (1, 2, 2), (0,), (0, 4)):
        x = inputs(case, *lead)
        y = layer(x)
        assert y.shape == (*lead, case.outputs), f"{tuple(x.shape)} became {tuple(y.shape)}"
        close(y, exact_output(layer, case, x), case)
    vector = inputs(case)[0]
    assert layer(vector).shape == (case.outputs,)


@promise()
def leaves_inputs_alone(method: Method, case: Case) -> None:
    layer, x = trained_layer(method, case), inputs(case)
    before_x, before_w = x.clone(), layer.weight.detach().clone()
    layer(x.requires_grad_(True)).sum().backward()
    assert torch.equal(x, before_x), "forward or backward changed x"
    changed = (layer.weight != before_w).any(0).nonzero().flatten().tolist()
    allowed: tuple[int, ...] = ()
    if isinstance(method, InPlace):
        assert layer.adapter is not None
        allowed = layer.adapter.to_lora().columns or ()
    assert set(changed) <= set(allowed), f"forward or backward changed the weight's columns {changed}"


@promise()
def trains_what_it_declares(method: Method, case: Case) -> None:
    layer = trained_layer(method, case)
    count = sum(parameter.numel() for parameter in trainable(layer).values())
    expected = method.trained(case.shape, case.rank)
    assert count == expected, f"{count} numbers train, the formula says {expected}"
    if method.shares_base:
        assert not layer.weight.requires_grad, "the base is shared, yet it trains"
    layer(inputs(case)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == parameter.requires_grad, (
            f"{name}: trains {parameter.requires_grad}, reached {reached}"
        )


@promise()
def gradients_are_right(method: Method, case: Case) -> None:
    """Gradcheck in float64; agreement with the float64 layer at lower precision."""
    layer = trained_layer(method, case)
    if case.dtype == torch.float64:
        _gradcheck(layer, case, list(trainable(layer)))
        return
    x, exact_x = inputs(case).requires_grad_(True), inputs(case).double().requires_grad_(True)
    exact = copy.deepcopy(layer).double()
    loss(layer(x)).backward()
    # The float64 loss takes the weights that the other one rounded.
    y = exact(exact_x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(case.dtype)
    (y * weights.double()).sum().backward()
    close_gradient(x, exact_x.grad, case)
    for name, parameter in trainable(layer).items():
        close_gradient(parameter, exact.get_parameter(name).grad, case)


def _gradcheck(layer: AdapterLinear, case: Case, names: list[str]) -> None:
    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [layer.get_parameter(name).detach().clone().requires_grad_(True) for name in names]
    try:
        torch.autograd.gradcheck(run, (inputs(case).requires_grad_(True), *values))
    except RuntimeError as error:
        raise AssertionError(f"gradcheck: {error}") from error


@promise(of=no(exports_lora), over=once)
def refuses_to_export(method: Method, case: Case) -> None:
    adapter = trained_layer(method, case).adapter
    assert adapter is not None
    with pytest.raises(MethodError, match="no low-rank factors"):
        adapter.to_lora()


@promise(of=exports_lora)
def exports_its_delta(method: Method, case: Case) -> None:
    layer, x = trained_layer(method, case), inputs(case)
    assert layer.adapter is not None
    factors = layer.adapter.to_lora()
    rank = case.rank * (case.links if isinstance(method, Chain) else 1)
    assert factors.rank == rank, f"rank {factors.rank}, of all links {rank}"
    assert factors.b.shape == (case.outputs, rank)
    assert factors.a.shape == (rank, case.inputs)
    assert factors.scale == case.scale, f"scale {factors.scale}, by definition {case.scale}"
    assert not factors.a.requires_grad
    assert not factors.b.requires_grad
    # A difference of two 16-bit weights does not fit into 16 bits.
    wide = torch.promote_types(case.dtype, torch.float32) if isinstance(method, InPlace) else case.dtype
    assert factors.a.dtype == factors.b.dtype == wide
    again = AdapterLinear(linear(case).to(wide), LoraAdapter(factors.a, factors.b, factors.scale))
    close(again(x.to(wide)), layer(x), case)
    if factors.columns is not None:
        selector = functional.one_hot(torch.tensor(factors.columns), case.inputs).to(wide)
        assert torch.equal(factors.a, selector), "A is not the selector of its columns"


@promise(of=exports_lora)
def survives_the_disk(method: Method, case: Case) -> None:
    adapter = trained_layer(method, case).adapter
    assert adapter is not None
    saved = AdapterArtifact({"layer": adapter.to_lora()}, meta=ArtifactMeta(method=method.name))
    with tempfile.TemporaryDirectory() as folder:
        loaded = AdapterArtifact.load(saved.save(Path(folder) / "adapter"))
    _same_factors(saved.modules["layer"], loaded.modules["layer"])
    assert loaded.content_hash == saved.content_hash, "the disk changed its identity"


def _same_factors(saved: LoraFactors, loaded: LoraFactors) -> None:
    assert torch.equal(saved.a, loaded.a)
    assert torch.equal(saved.b, loaded.b)
    assert saved.a.dtype == loaded.a.dtype
    assert saved.columns == loaded.columns
    # α = s·rank is what the file holds, so s may come back one unit in the last place off.
    assert math.isclose(saved.scale, loaded.scale, rel_tol=2 * torch.finfo(torch.float64).eps)


@promise()
def keeps_state_dict_keys(method: Method, case: Case) -> None:
    layer = trained_layer(method, case)
    base = set(linear(case).state_dict())
    keys = set(layer.state_dict())
    assert base <= keys, f"the base's keys {base - keys} are gone"
    foreign = {key for key in keys - base if not key.startswith("adapter.")}
    assert not foreign, f"{foreign} are neither the base's nor the adapter's"
    other = built(method, case, seed=1)
    other.load_state_dict(layer.state_dict())
    x = inputs(case)
    assert torch.equal(other(x), layer(x)), "a state dict does not carry the whole adapter"


@promise()
def is_decided_by_its_generator(method: Method, case: Case) -> None:
    first = built(method, case).state_dict()
    torch.rand(3)
    second = built(method, case).state_dict()
    for key, value in first.items():
        assert torch.equal(value, second[key]), f"{key} depends on more than the generator"


@promise(over=sizes)
def refuses_too_high_a_rank(method: Method, case: Case) -> None:
    limit = method.max_rank(case.shape)
    assert limit >= 1
    method.check(case.shape, limit, "some.module")
    with pytest.raises(TargetError, match=rf"rank {limit + 1} is above what some\.module"):
        method.check(case.shape, limit + 1, "some.module")


def _base(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    base = linear(case)
    return base.weight, base.bias


PROMISES: tuple[Promise, ...] = (
    starts_as_identity,
    starts_with_b_zero,
    computes_w_plus_delta,
    keeps_leading_shape,
    leaves_inputs_alone,
    trains_what_it_declares,
    gradients_are_right,
    exports_its_delta,
    refuses_to_export,
    survives_the_disk,
    keeps_state_dict_keys,
    is_decided_by_its_generator,
    refuses_too_high_a_rank,
    works_transposed,
    adds_to_a_base_that_is_no_matrix,
    refuses_a_base_that_is_no_matrix,
    drops_inputs_of_the_update_only,
    restores_its_base,
    refuses_too_long_a_chain,
    links_stack,
    has_no_next_link,
    draws_its_a,
    drops_nothing_of_past_links,
)


def run_all(method: Method, case: Case) -> None:
    """Check all promises that a method makes on one layer.

    Raises:
        AssertionError: naming the promise that is broken.
    """
    for made in PROMISES:
        if not made.of(method):
            continue
        try:
            made(method, case)
        except (AssertionError, pytest.fail.Exception) as error:
            raise AssertionError(f"{method.name} on {case}: {made.name}: {error}") from error

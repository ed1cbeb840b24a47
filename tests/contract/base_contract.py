"""What methods promise about the layer that they are put into: its layouts, a quantised one, its weight."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional

from rayft.errors import MethodError
from rayft.methods.base import AdapterLinear, Method
from rayft.numerics import assert_close, generator
from tests.contract.cases import (
    Case,
    Quantised,
    Transposed,
    adds_to_the_base,
    built,
    chains,
    close,
    close_gradient,
    delta,
    exact_output,
    first_links,
    inputs,
    later_links,
    linear,
    loss,
    no,
    once,
    perturb,
    promise,
    trainable,
    trained_layer,
)

DROPPED = 0.25
"""Probability of the dropout tests: not ½, where p and 1 − p can't be told apart."""
ROUNDS = 256
"""How often the dropout tests try each input."""


@promise()
def works_transposed(method: Method, case: Case) -> None:
    """The adapter is the same on a weight that is stored I × O as on one that is stored O × I."""
    plain, other = trained_layer(method, case), built(method, case, base=Transposed(linear(case)))
    fresh = built(method, case).state_dict()
    for key, value in other.state_dict().items():
        if key != "weight":
            assert torch.equal(value, fresh[key]), f"{key} starts differently where the weight is transposed"
    state = plain.state_dict()
    other.load_state_dict({key: value.t() if key == "weight" else value for key, value in state.items()})
    x, x_other = (inputs(case).requires_grad_(True) for _ in range(2))
    y = other(x_other)
    close(y, exact_output(plain, case, x), case)
    loss(plain(x)).backward()
    loss(y).backward()
    close_gradient(x_other, x.grad, case)
    for name, parameter in trainable(plain).items():
        assert parameter.grad is not None
        twin = other.get_parameter(name)
        close_gradient(twin, parameter.grad.t() if name == "weight" else parameter.grad, case)
    base = linear(case).weight
    assert plain.adapter is not None
    assert other.adapter is not None
    assert torch.equal(other.adapter.delta(base), plain.adapter.delta(base)), "ΔW differs"
    # The layer with other storage, as after a move to a device or into an engine's flat buffers.
    moved = copy.deepcopy(other).double()
    assert moved.adapter is not None
    moved.weight.data.mul_(2)
    if not method.shares_base:
        assert torch.equal(moved.adapter.delta(base.double()), moved.matrix - base.double()), "ΔW is stale"


@promise(of=no(adds_to_the_base), over=once)
def refuses_a_base_that_is_no_matrix(method: Method, case: Case) -> None:
    """A method that trains the base's weights refuses a quantised base, and dropout."""
    adapter = trained_layer(method, case).adapter
    assert adapter is not None
    with pytest.raises(MethodError, match=f"{method.name} trains the base's own weights"):
        adapter.update(inputs(case))
    with pytest.raises(MethodError, match=f"'{method.name}' trains the base's own weights"):
        method.check_base(quantised=True)
    assert "dropout" in method.ignored()


@promise(of=adds_to_the_base)
def adds_to_a_base_that_is_no_matrix(method: Method, case: Case) -> None:
    """`update` is x ΔWᵀ with its gradients, so that it can be added to the output of a quantised base."""
    method.check_base(quantised=True)
    layer = _without_matrix(method, case)
    assert layer.adapter is not None
    plain, exact_x = trained_layer(method, case), inputs(case).double().requires_grad_(True)
    x = inputs(case).requires_grad_(True)
    expected = functional.linear(exact_x, delta(plain, case))
    update = layer.adapter.update(x)
    close(update, expected, case)
    loss(update).backward()
    (gradient,) = torch.autograd.grad(loss(expected), exact_x)
    close_gradient(x, gradient, case)
    x.grad = None
    layer.zero_grad()
    y = layer(x)
    # One rounding more: the update is rounded before it is added.
    assert_close(y, exact_output(plain, case, x), case.dtype, case.inputs + case.rank * case.links, depth=5)
    loss(y).backward()
    loss(plain(inputs(case))).backward()
    for name, parameter in trainable(plain).items():
        close_gradient(layer.get_parameter(name), parameter.grad, case)


def _without_matrix(method: Method, case: Case) -> AdapterLinear:
    """Return the trained layer of a case on a base whose weight can't be read."""
    layer = perturb(built(method, case, base=Quantised(linear(case))))
    assert layer.quantised
    return layer


@promise(of=adds_to_the_base, over=first_links)
def drops_inputs_of_the_update_only(method: Method, case: Case) -> None:
    """In training, an input of the update is 0 or x/(1 − p); nothing of the base's product is dropped.

    In evaluation nothing is dropped.
    """
    assert "dropout" not in method.ignored()
    case = dataclasses.replace(case, links=1)
    probes = torch.eye(case.inputs, dtype=case.dtype).repeat(ROUNDS, 1)
    layer = built(method, case)
    assert layer.adapter is not None
    layer.adapter.dropout = DROPPED
    base = functional.linear(probes, layer.weight, layer.bias)
    assert torch.equal(layer.train()(probes), base), "dropout reached the base's product"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = perturb(layer).train()(probes).double()
    off = exact_output(trained_layer(method, case), case, torch.zeros_like(probes))
    off = off + functional.linear(probes.double(), linear(case).double().weight)
    whole = delta(layer, case)
    on = off + functional.linear(probes.double(), whole) / (1 - DROPPED)
    kept = (y - on).norm(dim=1) < (y - off).norm(dim=1)
    assert_close(y, torch.where(kept[:, None], on, off), case.dtype, case.inputs + case.rank, depth=5)
    live = kept[whole.norm(dim=0).repeat(ROUNDS) > 0].double()
    # Five standard deviations of a share of n draws.
    spread = 5 * (DROPPED * (1 - DROPPED) / len(live)) ** 0.5
    assert abs(live.mean().item() - (1 - DROPPED)) < spread, f"{live.mean():.3f} of the inputs were kept"
    assert torch.equal(layer.eval()(probes), trained_layer(method, case)(probes)), "dropout in evaluation"


@promise(of=chains, over=later_links)
def drops_nothing_of_past_links(method: Method, case: Case) -> None:
    """Right after a link has begun, its B is 0, so that dropout in training changes nothing."""
    if method.max_links(case.shape, case.rank) < 2:
        return
    chain = trained_layer(method, dataclasses.replace(case, links=1))
    assert chain.adapter is not None
    chain.adapter.dropout = DROPPED
    chain.adapter.advance(generator("next link"))
    probes = torch.eye(case.inputs, dtype=case.dtype)
    close(chain.train()(probes), chain.eval()(probes), case)


@promise(of=lambda method: method.shares_base)
def restores_its_base(method: Method, case: Case) -> None:
    """After `restore` the weight is what it was, bit by bit, in either layout."""
    for base in (linear(case), Transposed(linear(case))):
        layer = built(method, case, base=base)
        before = {name: value.detach().clone() for name, value in base.named_parameters()}
        for step in range(2):
            loss(perturb(layer, step)(inputs(case).requires_grad_(True))).backward()
        assert layer.adapter is not None
        layer.adapter.restore(layer.matrix)
        for name, value in base.named_parameters():
            assert torch.equal(value, before[name]), f"{name} is not what it was"

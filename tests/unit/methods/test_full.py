"""Full fine-tuning trains the layer's own weight, once, and has no factors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rayft.errors import MethodError
from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.methods.full import METHOD
from rayft.numerics import generator


def built() -> AdapterLinear:
    layer = AdapterLinear(nn.Linear(5, 4).requires_grad_(False))
    layer.adapter = METHOD.build(layer, MethodConfig(name="full"), generator(0))
    return layer


def test_the_weight_is_one_parameter() -> None:
    layer = built()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 20


def test_delta_is_what_changed() -> None:
    layer = built()
    before = layer.weight.detach().clone()
    layer.weight.data[1, 2] += 3
    assert layer.adapter is not None
    delta = layer.adapter.delta(before)
    assert delta[1, 2] == layer.weight.detach()[1, 2] - before[1, 2]
    assert delta.count_nonzero() == 1


def test_a_copy_follows_its_own_weight() -> None:
    layer = built()
    other = copy.deepcopy(layer)
    other.weight.data.zero_()
    assert layer.adapter is not None
    assert other.adapter is not None
    assert not layer.adapter.delta(layer.weight.detach()).any()
    assert torch.equal(other.adapter.delta(layer.weight.detach()), -layer.weight.detach())


def test_delta_follows_a_weight_that_is_given_other_storage() -> None:
    # As a move to a GPU, or an engine's flat buffers, do.
    layer = built()
    before = layer.weight.detach().clone()
    layer.weight = nn.Parameter(before + 1)
    assert layer.adapter is not None
    assert torch.equal(layer.adapter.delta(before), before + 1 - before)


def test_it_changes_its_base_and_exports_no_factors() -> None:
    assert not METHOD.shares_base
    assert not METHOD.exports_lora
    adapter = built().adapter
    assert adapter is not None
    with pytest.raises(MethodError, match="'full' has no low-rank factors"):
        adapter.to_lora()

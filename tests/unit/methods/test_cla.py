"""cLA selects the first R inputs; duplicate and shuffled columns of its kin work too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.methods.cla import METHOD, SelectorAdapter
from rayft.numerics import assert_close, generator


def layer_with(columns: list[int], outputs: int = 5, inputs: int = 6) -> AdapterLinear:
    linear = nn.Linear(inputs, outputs, dtype=torch.float64).requires_grad_(False)
    b = torch.empty(outputs, len(columns), dtype=torch.float64).normal_(generator=generator("b"))
    return AdapterLinear(linear, SelectorAdapter(torch.tensor(columns), b, inputs, scale=0.5))


def test_the_first_inputs_are_selected() -> None:
    adapter = METHOD.build(AdapterLinear(nn.Linear(6, 5)), MethodConfig(name="cla", rank=3), generator(0))
    assert isinstance(adapter, SelectorAdapter)
    assert adapter.columns.tolist() == [0, 1, 2]
    assert torch.equal(adapter.to_lora().a, torch.eye(6)[:3])


def test_only_b_is_a_parameter() -> None:
    adapter = layer_with([0, 1]).adapter
    assert adapter is not None
    assert [name for name, _ in adapter.named_parameters()] == ["lora_B"]
    assert [name for name, _ in adapter.named_buffers()] == ["columns"]


@pytest.mark.parametrize("columns", [[5, 0, 3], [4]])
def test_any_choice_of_columns_computes_w_plus_delta(columns: list[int]) -> None:
    layer = layer_with(columns)
    x = torch.randn(7, 6, dtype=torch.float64)
    assert layer.adapter is not None
    expected = functional.linear(x, layer.weight + layer.adapter.delta(layer.weight), layer.bias)
    assert_close(layer(x), expected, torch.float64, 6)


def test_a_column_selected_twice_gets_both_gradients() -> None:
    layer = layer_with([2, 4, 2])
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, (x,))
    assert isinstance(layer.adapter, SelectorAdapter)
    layer(x).sum().backward()
    base = layer.weight.sum(0)
    share = 0.5 * layer.adapter.lora_B.detach().sum(0)
    assert x.grad is not None
    assert_close(x.grad[0, 2], base[2] + share[0] + share[2], torch.float64, 6)


def test_full_width_reaches_any_update() -> None:
    # At R = I the selector is the identity: ΔW = s·B, unrestricted.
    layer = layer_with(list(range(6)))
    assert isinstance(layer.adapter, SelectorAdapter)
    assert torch.equal(layer.adapter.delta(layer.weight), 0.5 * layer.adapter.lora_B.detach())


def test_rank_may_exceed_the_outputs_but_not_the_inputs() -> None:
    shape = AdapterLinear(nn.Linear(6, 2)).shape
    assert METHOD.max_rank(shape) == 6
    assert METHOD.trained(shape, 6) == 12

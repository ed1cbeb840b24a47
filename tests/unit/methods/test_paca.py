"""PaCA trains columns of the base's own weight: what is exported is what was trained, and it is undone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayft.errors import MethodError
from rayft.methods import METHODS
from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.methods.cla import SelectorAdapter
from rayft.methods.paca import METHOD, ColumnAdapter
from rayft.numerics import assert_close, generator

CONFIG = MethodConfig(name="paca", rank=3, alpha=5.0)


def built(dtype: torch.dtype, name: str = "paca") -> AdapterLinear:
    base = nn.Linear(8, 6, bias=False, dtype=torch.float64)
    base.weight.data.normal_(generator=generator("w"))
    layer = AdapterLinear(base.to(dtype).requires_grad_(False))
    layer.adapter = METHODS[name].build(layer, CONFIG, generator("columns"))
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 0.01])
def test_the_exported_update_rounds_to_the_trained_weight(dtype: torch.dtype, size: float) -> None:
    layer = built(dtype)
    before = layer.weight.detach().clone()
    assert isinstance(layer.adapter, ColumnAdapter)
    move = torch.empty(6, 3).normal_(0, size, generator=generator("move"))
    layer.adapter.trained_columns.data += move.to(dtype)
    layer(torch.zeros(1, 8, dtype=dtype))
    assert not torch.equal(layer.weight, before)
    factors = layer.adapter.to_lora()
    assert factors.a.dtype == factors.b.dtype == torch.float32
    assert torch.equal((before.float() + factors.delta()).to(dtype), layer.weight)
    # In the base's own dtype the update would be lost in part.
    narrow = layer.adapter.trained_columns.detach() - before[:, layer.adapter.columns]
    assert narrow.dtype == dtype


def test_only_the_selected_columns_are_written_and_all_come_back() -> None:
    layer = built(torch.float32)
    before = layer.weight.detach().clone()
    assert isinstance(layer.adapter, ColumnAdapter)
    layer.adapter.trained_columns.data += 1
    layer(torch.zeros(1, 8))
    changed = (layer.weight != before).any(0).nonzero().flatten()
    assert torch.equal(changed, layer.adapter.columns)
    layer.adapter.restore(layer.matrix)
    assert torch.equal(layer.weight, before)


def test_with_adam_it_is_rcla_at_s_times_the_learning_rate() -> None:
    ours, theirs = built(torch.float64), built(torch.float64, "rcla")
    assert isinstance(ours.adapter, ColumnAdapter)
    assert isinstance(theirs.adapter, SelectorAdapter)
    assert torch.equal(ours.adapter.columns, theirs.adapter.columns)
    x, target = torch.randn(9, 8).double(), torch.randn(9, 6).double()
    # eps is what does not scale with the gradient.
    layers = [(ours, CONFIG.scale * 0.01), (theirs, 0.01)]
    optimizers = [
        torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=lr, eps=0)
        for layer, lr in layers
    ]
    for _ in range(5):
        for (layer, _lr), optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
    # Five steps, each of which may carry the last one's rounding on.
    assert_close(ours(x), theirs(x), torch.float64, 9, depth=5 * 8)


def test_a_layer_may_run_twice_in_one_graph() -> None:
    base = nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False)
    layer = AdapterLinear(base)
    layer.adapter = METHOD.build(layer, CONFIG, generator(0))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(layer(x)), (x,))
    layer(layer(x)).sum().backward()
    assert isinstance(layer.adapter, ColumnAdapter)
    assert layer.adapter.trained_columns.grad is not None


def test_it_runs_on_the_base_only() -> None:
    layer = built(torch.float32)
    assert layer.adapter is not None
    with pytest.raises(MethodError, match="paca trains the base's own weights; it can't run beside them"):
        layer.adapter.update(torch.zeros(1, 8))

"""r-c³LA takes c³LA's windows in an order that each layer draws once."""

from __future__ import annotations

import torch
from torch import nn

from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.methods.c3la import WindowChain
from rayft.methods.rc3la import METHOD
from rayft.numerics import generator


def built(*seed: object, inputs: int = 11, rank: int = 3) -> WindowChain:
    layer = AdapterLinear(nn.Linear(inputs, 2).requires_grad_(False))
    adapter = METHOD.build(layer, MethodConfig(name="rc3la", rank=rank), generator(*seed))
    assert isinstance(adapter, WindowChain)
    return adapter


def test_all_windows_come_once_the_wrapping_one_among_them() -> None:
    for seed in range(8):
        adapter = built(seed)
        for _ in range(3):
            adapter.advance(generator("unused"))
        links = sorted(adapter.columns.view(4, 3).tolist())
        assert links == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 0]]


def test_layers_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(built(seed, f"layer.{n}", inputs=60).order.tolist()) for seed in range(3) for n in range(3)
    }
    assert len(orders) == 9


def test_the_order_is_fixed_from_the_start_and_saved() -> None:
    one, other = built(0), built(1)
    other.load_state_dict(one.state_dict())
    one.advance(generator(2))
    other.advance(generator(3))
    assert torch.equal(one.columns, other.columns)

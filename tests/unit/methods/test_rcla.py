"""r-cLA selects distinct inputs at random, each layer its own."""

from __future__ import annotations

import torch
from torch import nn

from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.methods.cla import SelectorAdapter
from rayft.methods.rcla import METHOD, random_columns
from rayft.numerics import generator


def columns(rank: int, *seed: object) -> list[int]:
    return random_columns(AdapterLinear(nn.Linear(12, 3)), rank, generator(*seed)).tolist()


def test_columns_are_distinct_and_sorted() -> None:
    for seed in range(20):
        chosen = columns(5, seed)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == 5
    assert columns(12, "all") == list(range(12))


def test_every_input_can_be_chosen() -> None:
    assert {column for seed in range(60) for column in columns(2, seed)} == set(range(12))


def test_layers_and_seeds_choose_differently() -> None:
    drawn = {tuple(columns(5, seed, f"layers.{layer}.q_proj")) for seed in range(3) for layer in range(3)}
    assert len(drawn) == 9


def test_the_dtype_does_not_change_the_choice() -> None:
    chosen = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = AdapterLinear(nn.Linear(12, 3, dtype=dtype))
        adapter = METHOD.build(layer, MethodConfig(name="rcla", rank=4), generator("a"))
        assert isinstance(adapter, SelectorAdapter)
        chosen.append(adapter.columns.tolist())
    assert chosen[0] == chosen[1]

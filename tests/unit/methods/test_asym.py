"""Asymmetric LoRA's A is drawn uniformly among orthonormal rows, and stays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rayft.methods.asym import METHOD
from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.methods.lora import LoraAdapter
from rayft.numerics import assert_close, generator


def built(rank: int, seed: int = 0, inputs: int = 6) -> LoraAdapter:
    layer = AdapterLinear(nn.Linear(inputs, 8, dtype=torch.float64).requires_grad_(False))
    adapter = METHOD.build(layer, MethodConfig(name="asym", rank=rank), generator("asym", seed))
    assert isinstance(adapter, LoraAdapter)
    return adapter


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_singular_values_of_the_update_are_those_of_b(rank: int) -> None:
    adapter = built(rank)
    adapter.lora_B.data.normal_(generator=generator("b"))
    expected = adapter.scale * torch.linalg.svdvals(adapter.lora_B.detach())
    assert_close(torch.linalg.svdvals(adapter.to_lora().delta())[:rank], expected, torch.float64, 48, depth=4)


def test_no_direction_is_preferred() -> None:
    # QR alone returns rows whose first entries lean to one sign; each entry has mean 0, variance 1/I.
    draws = 400
    mean = torch.stack([built(2, seed).lora_A.detach() for seed in range(draws)]).mean(0)
    assert mean.abs().max().item() < 5 * math.sqrt(1 / 6 / draws)


def test_a_is_no_parameter_that_trains() -> None:
    assert [name for name, p in built(2).named_parameters() if p.requires_grad] == ["lora_B"]

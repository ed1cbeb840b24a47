"""LoRA+ is LoRA with another learning rate for B."""

from __future__ import annotations

import torch
from torch import nn

from rayft.methods import lora
from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.methods.lora_plus import METHOD
from rayft.methods.section import LR_RATIO
from rayft.numerics import generator


def test_the_adapter_is_loras_bit_by_bit() -> None:
    layer, config = AdapterLinear(nn.Linear(6, 5)), MethodConfig(name="lora_plus", rank=3)
    ours = METHOD.build(layer, config, generator("a")).state_dict()
    theirs = lora.METHOD.build(layer, config, generator("a")).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_b_learns_sixteen_times_as_fast() -> None:
    assert METHOD.b_learns_faster
    assert not lora.METHOD.b_learns_faster
    assert LR_RATIO == 16

"""LoRA+ is LoRA with another learning rate for B."""

from __future__ import annotations

import torch
from torch import nn

from rayft.methods import lora
from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.methods.lora_plus import LR_RATIO, METHOD
from rayft.numerics import generator


def test_the_adapter_is_loras_bit_by_bit() -> None:
    layer, config = AdapterLinear(nn.Linear(6, 5)), MethodConfig(name="lora_plus", rank=3)
    ours = METHOD.build(layer, config, generator("a")).state_dict()
    theirs = lora.METHOD.build(layer, config, generator("a")).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_b_learns_sixteen_times_as_fast() -> None:
    config, name = MethodConfig(name="lora_plus"), "layers.0.q_proj.adapter"
    assert METHOD.parameter_group(f"{name}.lora_B", config).lr_factor == LR_RATIO == 16
    assert METHOD.parameter_group(f"{name}.lora_A", config).lr_factor == 1
    assert lora.METHOD.parameter_group(f"{name}.lora_B", config).lr_factor == 1
    given = MethodConfig(name="lora_plus", lr_ratio=4.0)
    assert METHOD.parameter_group(f"{name}.lora_B", given).lr_factor == 4

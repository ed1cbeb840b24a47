"""COLA's links all train A and B, one after the other; stacked they are what merging would give."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.methods.cola import METHOD, GaussianChain
from rayft.numerics import assert_close, generator


def built(dtype: torch.dtype = torch.float64) -> AdapterLinear:
    base = nn.Linear(5, 4, bias=False, dtype=torch.float64).requires_grad_(False)
    base.weight.data.normal_(generator=generator("w"))
    layer = AdapterLinear(base.to(dtype))
    layer.adapter = METHOD.build(layer, MethodConfig(name="cola", rank=2), generator("a", 0))
    return layer


def test_training_a_stacked_chain_is_training_on_a_merged_base() -> None:
    stacked, merged = built(), built()
    x, target = torch.randn(9, 5).double(), torch.randn(9, 4).double()
    for link in range(3):
        if link:
            assert stacked.adapter is not None
            assert merged.adapter is not None
            merged.weight.data += merged.adapter.delta(merged.weight)
            merged.adapter = METHOD.build(merged, MethodConfig(name="cola", rank=2), generator("a", link))
            stacked.adapter.advance(generator("a", link))
        optimizers = [
            torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.01)
            for layer in (stacked, merged)
        ]
        for _ in range(4):
            for layer, optimizer in zip((stacked, merged), optimizers, strict=True):
                optimizer.zero_grad()
                (layer(x) - target).square().mean().backward()
                optimizer.step()
    # Twelve steps, each of which may carry the last one's rounding on.
    assert_close(stacked(x), merged(x), torch.float64, 9, depth=12 * 8)
    assert not torch.equal(stacked(x), functional.linear(x, stacked.weight, stacked.bias))


def test_the_next_link_trains_both_factors_in_the_layers_dtype() -> None:
    layer = built(torch.bfloat16)
    assert isinstance(layer.adapter, GaussianChain)
    first = layer.adapter.lora_A
    layer.adapter.advance(generator("next"))
    assert layer.adapter.lora_A is not first
    assert {name: p.dtype for name, p in layer.adapter.named_parameters() if p.requires_grad} == {
        "lora_A": torch.bfloat16,
        "lora_B": torch.bfloat16,
    }
    assert {name for name, _ in layer.adapter.named_buffers()} == {"past_A", "past_B"}


def test_stacked_links_may_exceed_what_one_link_can_hold() -> None:
    layer = built()
    assert isinstance(layer.adapter, GaussianChain)
    for link in range(1, 5):
        layer.adapter.advance(generator("next", link))
    assert METHOD.max_rank(layer.shape) == 4
    assert layer.adapter.to_lora().rank == 10

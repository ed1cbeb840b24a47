"""RAC's A is fresh in each link and never trains."""

from __future__ import annotations

import torch
from torch import nn

from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.methods.lora import LoraAdapter
from rayft.methods.rac import METHOD
from rayft.numerics import generator


def test_every_link_has_an_a_of_its_own_that_stays() -> None:
    layer = AdapterLinear(nn.Linear(5, 4, dtype=torch.float64).requires_grad_(False))
    adapter = METHOD.build(layer, MethodConfig(name="rac", rank=2), generator("a"))
    assert isinstance(adapter, LoraAdapter)
    layer.adapter = adapter
    links = []
    for link in range(3):
        if link:
            adapter.advance(generator("a", link))
        links.append(adapter.lora_A.detach().clone())
        assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["lora_B"]
        optimizer = torch.optim.AdamW([adapter.lora_B], lr=0.1, weight_decay=0.1)
        layer(torch.randn(6, 5).double()).square().sum().backward()
        optimizer.step()
        assert adapter.lora_A.grad is None
        assert adapter.lora_B.detach().any()
    assert torch.equal(adapter.to_lora().a, torch.cat(links))
    assert not torch.equal(links[0], links[1])
    assert not torch.equal(links[1], links[2])

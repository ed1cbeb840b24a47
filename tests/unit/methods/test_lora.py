"""LoRA's initialisation is the paper's, and its gradients are those of the formula."""

from __future__ import annotations

import math

import torch
from torch import nn

from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.methods.lora import METHOD, LoraAdapter
from rayft.numerics import assert_close, generator


def test_a_is_kaiming_uniform_with_root_five() -> None:
    layer = AdapterLinear(nn.Linear(400, 300))
    adapter = METHOD.build(layer, MethodConfig(rank=200), generator("init"))
    assert isinstance(adapter, LoraAdapter)
    a = adapter.lora_A.detach()
    reference = torch.empty(200, 400)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5), generator=generator("reference"))
    assert a.abs().max() <= 1 / math.sqrt(400)
    # Two spreads of n uniform draws each differ by √(2·0.2/n) of themselves, times 4 for luck.
    spread = abs(a.std() / reference.std() - 1).item()
    assert spread < 4 * math.sqrt(2 * 0.2 / a.numel())
    assert abs(a.mean().item()) < a.std().item() / math.sqrt(a.numel()) * 4


def test_another_seed_gives_another_a() -> None:
    layer = AdapterLinear(nn.Linear(8, 8))
    first, second = (METHOD.build(layer, MethodConfig(rank=2), generator(seed)) for seed in (0, 1))
    assert isinstance(first, LoraAdapter)
    assert isinstance(second, LoraAdapter)
    assert not torch.equal(first.lora_A, second.lora_A)


def test_gradients_are_the_formulas_in_the_docstring() -> None:
    layer = AdapterLinear(nn.Linear(5, 4, dtype=torch.float64).requires_grad_(False))
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    layer.adapter = LoraAdapter(a, b, scale=0.7)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(6, 4, dtype=torch.float64)
    layer(x).backward(g)
    assert isinstance(layer.adapter, LoraAdapter)
    grad_a, grad_b = layer.adapter.lora_A.grad, layer.adapter.lora_B.grad
    assert grad_a is not None
    assert grad_b is not None
    assert x.grad is not None
    q = 0.7 * g @ b
    assert_close(grad_b, 0.7 * g.t() @ (x.detach() @ a.t()), torch.float64, 6, depth=4)
    assert_close(grad_a, q.t() @ x.detach(), torch.float64, 6, depth=4)
    assert_close(x.grad, g @ layer.weight + q @ a, torch.float64, 6, depth=4)


def test_frozen_factors_get_no_gradient_but_pass_it_on() -> None:
    layer = AdapterLinear(nn.Linear(5, 4).requires_grad_(False))
    layer.adapter = LoraAdapter(torch.randn(3, 5), torch.randn(4, 3), 1.0).requires_grad_(False)
    x = torch.randn(2, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_max_rank_is_the_smaller_side() -> None:
    assert METHOD.max_rank(AdapterLinear(nn.Linear(6, 2)).shape) == 2

"""The methods' layers on a GPU: outputs and gradients against float64 on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from rayft.methods import METHODS
from rayft.methods.base import Chain
from rayft.numerics import assert_close
from tests.contract.methods_contract import Case, built, inputs, perturb

pytestmark = pytest.mark.gpu

CASE = Case(outputs=384, inputs=256, rank=16, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("links", [1, 3])
def test_a_layer_computes_what_it_does_on_the_cpu(name: str, links: int) -> None:
    method = METHODS[name]
    layer = perturb(built(method, CASE))
    for link in range(1, links if isinstance(method, Chain) else 1):
        assert layer.adapter is not None
        layer.adapter.advance(torch.Generator().manual_seed(link))
        perturb(layer)
    exact = copy.deepcopy(layer).double()
    layer = layer.cuda()
    x = inputs(CASE, 512)
    on_gpu, on_cpu = x.cuda().requires_grad_(True), x.double().requires_grad_(True)
    y, expected = layer(on_gpu), exact(on_cpu)
    assert_close(y.cpu(), expected, CASE.dtype, 512, depth=4)
    weights = torch.randn(512, CASE.outputs)
    (y * weights.cuda().bfloat16()).sum().backward()
    (expected * weights.bfloat16().double()).sum().backward()
    assert on_gpu.grad is not None
    assert_close(on_gpu.grad.cpu(), on_cpu.grad, CASE.dtype, 1024, depth=4)
    for (key, parameter), (_, other) in zip(layer.named_parameters(), exact.named_parameters(), strict=True):
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert_close(parameter.grad.cpu(), other.grad, CASE.dtype, 1024, depth=4)

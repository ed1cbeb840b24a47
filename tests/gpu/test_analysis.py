"""The analyses that a GPU does otherwise: products with the Hessian are replayed as a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rayft.analysis import sharpness
from rayft.analysis.directions import random_directions
from rayft.analysis.landscape import grid_2d, losses
from rayft.analysis.sharpness import HessianOperator, ReplayedOperator, adapter_curvature
from rayft.numerics import assert_close, generator
from tests.unit.analysis.models import adapter_for, batches_for, load

pytestmark = pytest.mark.gpu


@pytest.fixture
def llama(tiny_folder):
    """The model and its batches on the CPU and on the GPU."""
    found = []
    for device in ("cpu", "cuda"):
        loaded = load(tiny_folder)
        batches = [batch.to(device) for batch in batches_for(loaded)]
        found.append((loaded.model.to(device), batches))
    return found


def test_a_replayed_product_is_that_without_a_graph(llama) -> None:
    _, (model, batches) = llama
    modules = adapter_for(model, rank=2)
    with sharpness._balanced(model, batches, modules) as (parameters, terms, _), sdpa_kernel(SDPBackend.MATH):
        eager = HessianOperator(terms, parameters)
        replayed = ReplayedOperator(eager)
        size = eager.shape[0]
        vectors = torch.randn(size, 3, generator=generator("vectors"), dtype=torch.float64).cuda()
        for _ in range(2):
            assert_close(replayed @ vectors, eager @ vectors, torch.float64, size)
            assert_close(replayed @ vectors[:, 1], eager @ vectors[:, 1], torch.float64, size)
        assert float((replayed @ vectors).norm()) > 0


def test_curvature_on_the_gpu_is_that_on_the_cpu(llama, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(
        sharpness, "ReplayedOperator", lambda operator: made.append(ReplayedOperator(operator)) or made[-1]
    )
    modules = adapter_for(llama[0][0], "layers.1.mlp.up_proj")
    cpu, gpu = (adapter_curvature(model, batches, modules, count=3, products=93) for model, batches in llama)
    assert made, "it was captured"
    for one, other in zip(gpu.eigenvalues, cpu.eigenvalues, strict=True):
        assert_close(torch.tensor(one), torch.tensor(other), torch.float32, 64)
    # Each draws on its own device; 93 products are nearly all of the adapter's dimensions.
    assert abs(gpu.trace - cpu.trace) < 0.05 * abs(cpu.trace)


def test_a_landscape_on_the_gpu_is_that_on_the_cpu(llama) -> None:
    points = grid_2d(5, 1.0)
    cpu, gpu = (
        losses(model, batches, modules, [*random_directions(modules, 2, 0, "update", None)], points, 64)
        for model, batches in llama
        for modules in [adapter_for(llama[0][0], rank=2)]
    )
    # Losses are float32, whatever the model is.
    assert_close(gpu, cpu, torch.float32, 256)

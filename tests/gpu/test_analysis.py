"""The analyses that a GPU does otherwise: products with the Hessian are replayed as a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rayft.analysis import hessian, sharpness
from rayft.analysis.directions import random_directions, trajectory_directions
from rayft.analysis.hessian import HessianOperator, ReplayedOperator, hessian_operator
from rayft.analysis.landscape import grid_2d, losses
from rayft.analysis.norms import spectral_norms
from rayft.analysis.sharpness import adapter_curvature
from rayft.methods.base import LoraFactors
from rayft.models.inject import wrap
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
        size = eager.shape[0]
        vectors = torch.randn(size, 3, generator=generator("vectors"), dtype=torch.float64).cuda()
        # First: a gradient that is kept has the parameters' nodes on the capture's stream, and PyTorch warns
        # of whoever uses them on another.
        expected = eager @ vectors
        assert float(expected.norm()) > 0
        replayed = ReplayedOperator(HessianOperator(terms, parameters, keep=True))
        for _ in range(2):
            assert_close(replayed @ vectors, expected, torch.float64, size)
            assert_close(replayed @ vectors[:, 1], expected[:, 1], torch.float64, size)


def test_without_room_to_keep_the_gradient_it_is_computed_each_time(llama, monkeypatch) -> None:
    _, (model, batches) = llama

    def full(_: HessianOperator) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(hessian, "ReplayedOperator", full)
    modules = adapter_for(model, rank=2)
    with sharpness._balanced(model, batches, modules) as (parameters, terms, _), sdpa_kernel(SDPBackend.MATH):
        found = hessian_operator(terms, parameters)
        assert isinstance(found, HessianOperator)
        assert not found._keep
        vector = torch.ones(found.shape[0], dtype=torch.float64).cuda()
        assert_close(found @ vector, HessianOperator(terms, parameters) @ vector, torch.float64, len(vector))


def test_curvature_on_the_gpu_is_that_on_the_cpu(llama, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(
        hessian, "ReplayedOperator", lambda operator: made.append(ReplayedOperator(operator)) or made[-1]
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


def test_what_is_decomposed_on_the_gpu_is_that_on_the_cpu(llama) -> None:
    path = [adapter_for(llama[0][0], rank=rank) for rank in (1, 3, 2)]
    moved = [
        {name: LoraFactors(f.a.cuda(), f.b.cuda(), f.scale) for name, f in point.items()} for point in path
    ]
    cpu, gpu = trajectory_directions(path), trajectory_directions(moved)
    assert_close(gpu.coordinates, cpu.coordinates, torch.float64, 64, depth=16)
    for model, _ in llama:
        wrap(model)
    one, other = (spectral_norms(model) for model, _ in llama)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_close(
            torch.tensor(other[name], dtype=torch.float64),
            torch.tensor(value, dtype=torch.float64),
            torch.float64,
            64,
            depth=16,
        )

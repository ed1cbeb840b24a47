"""Norms against a dense SVD and against inputs that are known."""

from __future__ import annotations

import pytest
import torch

from rayft.analysis.norms import spectral_norm, spectral_norms
from rayft.models.inject import wrap
from rayft.numerics import assert_close, generator
from tests.unit.analysis.models import load


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)])
def test_the_spectral_norm_is_the_largest_singular_value(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=generator("weight", *shape), dtype=torch.float64)
    expected = torch.linalg.svdvals(weight)[0]
    assert_close(
        torch.tensor(spectral_norm(weight), dtype=torch.float64), expected, torch.float64, 9, depth=2
    )
    assert spectral_norm(torch.zeros(shape)) == 0


def test_every_layer_of_a_base_has_one(tiny_folder) -> None:
    model = load(tiny_folder).model
    wrap(model)
    found = spectral_norms(model)
    assert len(found) == 14
    for path, value in found.items():
        expected = torch.linalg.matrix_norm(model.get_submodule(path).weight.double(), 2)
        assert_close(torch.tensor(value, dtype=torch.float64), expected, torch.float64, 64, depth=2)

"""Spectra against dense SVDs, angles that are known, and intruders that were put there."""

from __future__ import annotations

import math

import pytest
import torch

from rayft.analysis.spectral import (
    SpectralSummary,
    effective_rank,
    energy_rank,
    numerical_rank,
    principal_angles,
    spectral_summary,
    stable_rank,
    summaries,
    summary,
)
from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, BaseMismatchError, ReportError
from rayft.methods.base import LoraFactors
from rayft.numerics import assert_close, tolerance
from tests.unit.analysis.matrices import assert_equal, gaussian, orthonormal


def numbers(found: SpectralSummary) -> torch.Tensor:
    floats = [found.effective_rank, found.stable_rank, found.spectral, found.frobenius, found.nuclear]
    return torch.tensor(floats, dtype=torch.float64)


def example(kind: str) -> tuple[LoraFactors, int]:
    """Return factors of ΔW, and its rank."""
    a, b = gaussian(5, 17), gaussian(23, 5)
    if kind == "selector":
        a = torch.eye(17, dtype=torch.float64)[[3, 0, 16, 8, 9]]
        return LoraFactors(a, b, 2.0, columns=(3, 0, 16, 8, 9)), 5
    if kind == "repeated columns":
        a = torch.eye(17, dtype=torch.float64)[[3, 3, 16, 8, 8]]
        return LoraFactors(a, b, 2.0, columns=(3, 3, 16, 8, 8)), 3
    if kind == "deficient":
        b[:, 4] = b[:, 0] - 2 * b[:, 1]
        return LoraFactors(a, b, 0.5), 4
    if kind == "wider than the layer":
        return LoraFactors(gaussian(9, 6), gaussian(7, 9), -1.5), 6
    return LoraFactors(a, b, 0.5), 5


KINDS = ["random", "deficient", "selector", "repeated columns", "wider than the layer"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_summary_equals_that_of_the_dense_update(kind: str) -> None:
    factors, rank = example(kind)
    delta = factors.scale * (factors.b @ factors.a)
    s = torch.linalg.svdvals(delta)[:rank]
    found = summary(factors, shares=[0.5, 0.9])
    p = s / s.sum()
    expected = [
        float((-(p * p.log()).sum()).exp()),
        float(delta.square().sum() / torch.linalg.matrix_norm(delta, 2) ** 2),
        float(torch.linalg.matrix_norm(delta, 2)),
        float(delta.norm()),
        float(torch.linalg.matrix_norm(delta, "nuc")),
    ]
    assert found.rank == rank == int(torch.linalg.matrix_rank(delta))
    assert_close(numbers(found), torch.tensor(expected, dtype=torch.float64), torch.float64, 40)
    for share, k in found.energy_ranks.items():
        kept = [float(s[:n].square().sum() / delta.square().sum()) for n in (k - 1, k)]
        assert kept[0] < share <= kept[1]


def test_measures_equal_those_computed_by_hand() -> None:
    s = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    # p = 3/4, 1/4: exp(H) = (4/3)^(3/4)·4^(1/4) = 4/3^(3/4).
    assert_equal(effective_rank(s), 4 / 3**0.75)
    assert_equal(stable_rank(s), 10 / 9)
    assert [energy_rank(s, share) for share in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]
    assert_equal(effective_rank(torch.full((7,), 1e-3)), 7.0)
    assert_equal(stable_rank(torch.full((7,), 1e-3)), 7.0)
    tiny = s * 1e-200
    assert_equal(stable_rank(tiny), 10 / 9)
    assert energy_rank(tiny, 0.91) == 2
    found = spectral_summary(s, 3, shares=[0.91])
    assert (found.rank, found.energy_ranks, found.spectral, found.nuclear) == (2, {0.91: 2}, 3.0, 4.0)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaled_factors_are_the_same_update(kind: str) -> None:
    factors, _ = example(kind)
    same = LoraFactors(factors.a / 32, factors.b * 32, factors.scale)
    first, second = summary(factors), summary(same)
    assert_close(numbers(second), numbers(first), torch.float64, 40)
    assert (second.rank, second.energy_ranks) == (first.rank, first.energy_ranks)
    mixed = LoraFactors(factors.a.flip(0) / 3, factors.b.flip(1), 3 * factors.scale)
    assert_close(numbers(summary(mixed)), numbers(first), torch.float64, 40)


def test_no_update_has_rank_0_and_finite_measures() -> None:
    found = summary(LoraFactors(gaussian(3, 8), torch.zeros(6, 3, dtype=torch.float64), 2.0))
    none = dict.fromkeys((0.9, 0.95, 0.99), 0)
    assert found == SpectralSummary(0, 0.0, 0.0, none, 0.0, 0.0, 0.0)
    assert summary(LoraFactors(gaussian(3, 8), gaussian(6, 3), 0.0)) == found


def test_an_adapter_is_summarised_module_by_module() -> None:
    modules = {kind: example(kind)[0] for kind in KINDS}
    found = summaries(AdapterArtifact(modules))
    assert list(found) == KINDS
    for kind, factors in modules.items():
        assert found[kind] == summary(factors)


def test_what_has_no_spectrum_is_refused() -> None:
    factors, _ = example("random")
    factors.b[2, 1] = math.nan
    with pytest.raises(ArtifactError, match="up: it holds NaN"):
        summaries(AdapterArtifact({"up": factors}))
    with pytest.raises(ReportError, match="share 0"):
        energy_rank(torch.ones(2), 0)


def rotated(angles: list[float], side: str) -> tuple[LoraFactors, LoraFactors]:
    """Make two updates whose spans on one side are at these angles; on the other side they are unrelated."""
    count = len(angles)
    frame = orthonormal(2 * count + 3, 2 * count)
    here, there = frame[:, :count], frame[:, count:]
    theta = torch.tensor(angles, dtype=torch.float64)
    turned = here * theta.cos() + there * theta.sin()
    # Any invertible mixture of the columns spans the same.
    wide = [(here @ gaussian(count, count), gaussian(count, 19)), (turned, gaussian(count, 19) + 1)]
    first, second = (LoraFactors(a, b, 1.5) for b, a in wide)
    if side == "input":
        first, second = (LoraFactors(f.b.t(), f.a.t(), f.scale) for f in (first, second))
    return first, second


@pytest.mark.parametrize("side", ["output", "input"])
def test_known_angles_are_found(side: str) -> None:
    angles = [1e-9, 1e-5, 0.3, math.pi / 4, 1.2, math.pi / 2]
    first, second = rotated(angles, side)
    found = principal_angles(first, second, side)
    # Each angle by itself: rounding turns the spans by their factors' condition times it.
    condition = max(float(torch.linalg.cond(m)) for f in (first, second) for m in (f.b, f.a))
    allowed = tolerance(torch.float64, 19) * condition**2
    assert allowed < 1e-2 * angles[0]
    for value, expected in zip(found, angles, strict=True):
        assert abs(float(value) - expected) <= allowed


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_at_no_angle_to_itself(kind: str, side: str) -> None:
    factors, rank = example(kind)
    mixed = LoraFactors(factors.a.flip(0) / 3, -factors.b.flip(1), factors.scale)
    found = principal_angles(factors, mixed, side)
    assert found.shape == (rank,)
    condition = max(float(torch.linalg.cond(m)) for m in (factors.b[:, :rank], factors.a[:rank]))
    assert float(found.max()) <= tolerance(torch.float64, 23) * max(condition, 10) ** 2


def test_angles_are_between_the_top_directions() -> None:
    u, v = orthonormal(9, 4), orthonormal(8, 4)
    s = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    first = LoraFactors(v.t(), u * s, 1.0)
    second = LoraFactors(v.t(), u * s.flip(0), 1.0)
    right = math.pi / 2
    for top, expected in [(1, [right]), (2, [right, right]), (3, [0, 0, right]), (4, [0] * 4), (9, [0] * 4)]:
        found = principal_angles(first, second, "output", top)
        wanted = torch.tensor(expected, dtype=torch.float64)
        assert_close(found, wanted, torch.float64, 9)


def test_subspaces_of_two_sizes_have_the_smaller_ones_angles() -> None:
    u, v = orthonormal(9, 4), orthonormal(8, 4)
    large = LoraFactors(v.t(), u, 1.0)
    inside = LoraFactors(v[:, :2].t(), u[:, 1:3], 1.0)
    for first, second in [(large, inside), (inside, large)]:
        assert_close(principal_angles(first, second, "output"), torch.zeros(2).double(), torch.float64, 9)
    nothing = LoraFactors(v.t(), 0 * u, 1.0)
    assert principal_angles(large, nothing, "output").shape == (0,)


def test_angles_between_different_layers_are_refused() -> None:
    first, second = (
        LoraFactors(gaussian(2, 8), gaussian(6, 2), 1.0),
        LoraFactors(gaussian(2, 8), gaussian(7, 2), 1.0),
    )
    with pytest.raises(BaseMismatchError, match="6 and 7 outputs"):
        principal_angles(first, second, "output")
    assert principal_angles(first, second, "input").shape == (2,)
    with pytest.raises(ReportError, match="top is 0"):
        principal_angles(first, second, "input", 0)


def test_an_empty_spectrum_has_rank_zero() -> None:
    empty = torch.zeros(0)
    assert numerical_rank(empty, 5) == energy_rank(empty, 0.9) == 0
    assert spectral_summary(empty, 5).spectral == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_have_no_energy_rank(value: float) -> None:
    for rank in (lambda s: energy_rank(s, 0.9), lambda s: spectral_summary(s, 5)):
        with pytest.raises(ArtifactError, match="holds NaN or Inf"):
            rank(torch.tensor([1.0, value]))


def test_a_side_that_does_not_exist_is_refused() -> None:
    factors = LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 1.0)
    with pytest.raises(ReportError, match="side is 'rows'"):
        principal_angles(factors, factors, "rows")  # type: ignore[arg-type]

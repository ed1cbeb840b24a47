"""Spectra against dense SVDs, angles that are known, and intruders that were put there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayft.analysis.spectral import (
    SpectralSummary,
    count_below,
    effective_rank,
    energy_rank,
    max_cosines,
    principal_angles,
    random_baseline,
    spectral_summary,
    stable_rank,
    summaries,
    summary,
)
from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, BaseMismatchError, ReportError
from rayft.methods.base import LoraFactors
from rayft.numerics import assert_close, generator, tolerance


def intruders(weight0, update, epsilons, top=10) -> dict[float, int]:
    return count_below(max_cosines(weight0, update, top), epsilons, weight0.shape[0])


EPSILONS = [0.2, 0.4, 0.6, 0.8, 0.95, 1.0]


def gaussian(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=generator("spectral", *size), dtype=torch.float64)


def orthonormal(outputs: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(outputs, columns))[0]


def assert_equal(actual: float, expected: float, roundings: int = 40) -> None:
    wide = torch.float64
    assert_close(torch.tensor(actual, dtype=wide), torch.tensor(expected, dtype=wide), wide, roundings)


def numbers(found: SpectralSummary) -> torch.Tensor:
    floats = [found.effective_rank, found.stable_rank, found.spectral, found.frobenius, found.nuclear]
    return torch.tensor(floats, dtype=torch.float64)


def example(kind: str) -> tuple[LoraFactors, int]:
    """Give factors of ΔW and its rank."""
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
def test_a_summary_is_that_of_the_dense_update(kind: str) -> None:
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


def test_measures_worked_out_by_hand() -> None:
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


def test_an_adapter_is_summed_up_module_by_module() -> None:
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


def weight(outputs: int, inputs: int) -> torch.Tensor:
    """Make a weight with singular values from 10 down to 1."""
    k = min(outputs, inputs)
    return (orthonormal(outputs, k) * torch.linspace(10, 1, k, dtype=torch.float64)) @ orthonormal(
        inputs, k
    ).t()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(20, 20), (30, 12), (12, 30)])
def test_no_update_has_no_intruders(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    w0 = weight(outputs, inputs).to(dtype)
    nothing = LoraFactors(gaussian(2, inputs).to(dtype), torch.zeros(outputs, 2, dtype=dtype), 1.0)
    for top in (10, None):
        assert set(intruders(w0, nothing, EPSILONS, top).values()) == {0}
    found = max_cosines(w0, nothing, None)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found, torch.ones(min(outputs, inputs), dtype=found.dtype), found.dtype, outputs)


def test_a_large_rank_one_update_is_one_intruder() -> None:
    n = 24
    w0 = weight(n, n)
    u0, _, v0 = torch.linalg.svd(w0)
    # Spread over W0's 16 smallest directions: its |cos| to each is 1/4.
    b = u0[:, 8:].sum(1, keepdim=True) / 4
    update = LoraFactors(v0[-1:], b, 200.0)
    found = intruders(w0, update, [0.2, 0.3, 0.4], top=9)
    assert found == {0.2: 0, 0.3: 1, 0.4: 1}
    cosines = max_cosines(w0, update, top=9)
    # The update moves its own direction by W0's part of it, at most ‖W0‖/‖ΔW‖ (Wedin).
    assert abs(float(cosines[0]) - 0.25) <= 10 / (200 - 10)
    assert_close(cosines[1:], torch.ones(8, dtype=torch.float64), torch.float64, n)


def test_the_count_equals_a_plain_loop_and_grows_with_epsilon() -> None:
    w0, update = weight(20, 15), LoraFactors(gaussian(4, 15), gaussian(20, 4), 0.7)
    before = torch.linalg.svd(w0, full_matrices=False).U
    after = torch.linalg.svd(w0 + update.delta(), full_matrices=False).U
    for top in (3, 10, None):
        vectors = [after[:, i] for i in range(15 if top is None else top)]
        largest = [max(abs(float(v @ before[:, j])) for j in range(15)) for v in vectors]
        found = intruders(w0, update, EPSILONS, top)
        assert found == {epsilon: sum(value < epsilon for value in largest) for epsilon in EPSILONS}
        assert found == intruders(w0, update.delta(), EPSILONS, top)
        counts = list(found.values())
        assert counts == sorted(counts)
        assert counts[0] < counts[-1] == len(vectors)


def test_what_is_written_outside_a_tall_weights_outputs_intrudes() -> None:
    full = orthonormal(12, 6)
    w0 = (full[:, :4] * torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)) @ orthonormal(5, 5)[
        :, :4
    ].t()
    update = LoraFactors(orthonormal(5, 5)[:, 4:].t(), full[:, 5:], 50.0)
    # W0 is 12 × 5 and of rank 4, W0 + ΔW of rank 5: its zero and W0's are no directions.
    cosines = max_cosines(w0, update, None)
    assert_close(cosines, torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64), torch.float64, 12)
    assert intruders(w0, update, [0.01, 1.0], None) == {0.01: 1, 1.0: 1}
    assert intruders(0 * w0, update, [0.01], None) == {0.01: 1}
    assert intruders(0 * w0, 0 * w0, [0.01], None) == {0.01: 0}


def test_an_equal_cosine_is_not_below() -> None:
    cosines = torch.tensor([0.5, 0.5 - 1e-15, 0.49], dtype=torch.float64)
    assert count_below(cosines, [0.5, 0.51], 8) == {0.5: 1, 0.51: 3}


def test_impossible_intruders_are_refused() -> None:
    w0 = weight(6, 6)
    with pytest.raises(ReportError, match="epsilon 0"):
        intruders(w0, w0, [0.5, 0.0])
    with pytest.raises(ReportError, match="top is 0"):
        intruders(w0, w0, [0.5], top=0)
    with pytest.raises(BaseMismatchError, match=r"\(6, 6\)"):
        intruders(w0, w0[:, :1], [0.5])
    with pytest.raises(ArtifactError, match="NaN"):
        intruders(w0, w0 * math.nan, [0.5])
    with pytest.raises(ReportError, match="7 basis"):
        random_baseline(6, [0.5], basis=7)


def near(share: float, expected: float, draws: int) -> bool:
    """Tell whether a share of draws lies within five standard errors."""
    return abs(share - expected) <= 5 * math.sqrt(max(expected * (1 - expected), 1 / draws) / draws)


def test_the_baseline_of_two_and_three_dimensions() -> None:
    draws = 20_000
    # On the circle the largest coordinate is below c outside of arccos(c) around each axis; on the
    # sphere (Archimedes) the two caps of an axis beyond c have the share 1 − c, disjoint from c = 1/√2 on.
    plane = random_baseline(2, [0.7, 0.75, 0.9, 0.97], draws, seed=1)
    for c, share in plane.shares.items():
        assert near(share, max(0.0, 1 - math.acos(c) / (math.pi / 4)), draws)
    for basis in (1, 2, 3):
        solid = random_baseline(3, [0.72, 0.8, 0.95], draws, seed=2, basis=basis)
        for c, share in solid.shares.items():
            assert near(share, 1 - basis * (1 - c), draws)


def test_the_baseline_against_another_basis_and_other_numbers() -> None:
    size, draws = 64, 4000
    found = random_baseline(size, [0.25, 0.3, 0.35, 0.4], draws, seed=3)
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    vectors = rng.standard_normal((draws, size))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    largest = np.abs(vectors @ basis).max(axis=1)
    for epsilon, share in found.shares.items():
        # Two samples: twice the variance.
        assert near(share, float((largest < epsilon).mean()), draws // 2)
    assert_equal(found.typical, math.sqrt(2 * math.log(64) / 64))
    assert_equal(random_baseline(size, [0.5], 1, basis=8).typical, math.sqrt(2 * math.log(8) / 64))
    assert largest.mean() < found.typical < np.quantile(largest, 0.9)


def test_the_baseline_is_drawn_by_its_seed() -> None:
    first, again, other = (random_baseline(16, [0.5], 500, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_the_baseline_draws_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_baseline(8, [0.5, 0.6], 2000, seed=4)
    monkeypatch.setattr("rayft.analysis.spectral.DRAWS_AT_ONCE", 8 * 300)
    parts = random_baseline(8, [0.5, 0.6], 2000, seed=4)
    for epsilon, share in parts.shares.items():
        assert near(share, whole.shares[epsilon], 1000)

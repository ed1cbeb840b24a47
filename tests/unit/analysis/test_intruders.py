"""Intruder dimensions against plain loops, and random directions against known distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayft.analysis.intruders import count_below, max_cosines, random_baseline
from rayft.errors import ArtifactError, BaseMismatchError, ReportError
from rayft.methods.base import LoraFactors
from rayft.numerics import assert_close
from tests.unit.analysis.matrices import assert_equal, gaussian, orthonormal


def intruders(weight0, update, epsilons, top=10) -> dict[float, int]:
    return count_below(max_cosines(weight0, update, top), epsilons, weight0.shape[0])


EPSILONS = [0.2, 0.4, 0.6, 0.8, 0.95, 1.0]


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


def test_an_update_outside_the_outputs_of_a_tall_weight_intrudes() -> None:
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


def test_a_cosine_equal_to_epsilon_is_not_counted() -> None:
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
    """Return whether a share of draws lies within five standard errors."""
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
    monkeypatch.setattr("rayft.analysis.intruders.DRAWS_AT_ONCE", 8 * 300)
    parts = random_baseline(8, [0.5, 0.6], 2000, seed=4)
    for epsilon, share in parts.shares.items():
        assert near(share, whole.shares[epsilon], 1000)

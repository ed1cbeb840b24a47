"""Randomised SVD against a dense one in float64, and against the bounds that its paper proves."""

from __future__ import annotations

import math

import pytest
import torch

from rayft.errors import SqueezeError
from rayft.numerics import assert_close, generator, tolerance
from rayft.squeeze.factored_svd import FactoredSVD
from rayft.squeeze.randomised_svd import randomised_svd, svd_for_energy, total_energy

SMALL = 90
SPECTRA = {
    "harmonic": 1 / torch.arange(1, SMALL + 1, dtype=torch.float64),
    "exponential": torch.exp(-torch.arange(SMALL, dtype=torch.float64) / 6),
    "flat": torch.ones(SMALL, dtype=torch.float64),
}


def matrix(singular: torch.Tensor, outputs: int = 120, inputs: int = SMALL) -> torch.Tensor:
    draw = generator("spectrum", outputs, inputs)
    u, v = (
        torch.linalg.qr(torch.randn(size, len(singular), generator=draw, dtype=torch.float64)).Q
        for size in (outputs, inputs)
    )
    return (u * singular) @ v.t()


def product(svd: FactoredSVD) -> torch.Tensor:
    return (svd.u * svd.s) @ svd.v.t()


def best(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def orthonormal(x: torch.Tensor) -> None:
    assert_close(x.t() @ x, torch.eye(x.shape[1], dtype=torch.float64), torch.float64, len(x))


@pytest.mark.parametrize(("outputs", "inputs"), [(120, SMALL), (SMALL, 120)])
@pytest.mark.parametrize("name", SPECTRA)
def test_errors_stay_below_the_bounds(name: str, outputs: int, inputs: int) -> None:
    singular, rank, extra, powers = SPECTRA[name], 8, 10, 2
    delta = matrix(singular, outputs, inputs)
    svd = randomised_svd(delta, rank, generator=generator(0))
    assert svd.u.shape == (outputs, rank)
    assert svd.v.shape == (inputs, rank)
    orthonormal(svd.u)
    orthonormal(svd.v)
    # Halko et al., Corollary 10.10 (for the range) and Theorem 9.3 (for its truncation), times σ_{k+1}.
    columns = rank + extra
    constant = 1 + math.sqrt(rank / (extra - 1)) + math.e * math.sqrt(columns * (SMALL - rank)) / extra
    error = torch.linalg.matrix_norm(delta - product(svd), ord=2)
    assert float(error) <= float(singular[rank]) * (1 + constant ** (1 / (2 * powers + 1)))
    # A projection makes no singular value larger.
    assert bool((svd.s <= singular[:rank] * (1 + tolerance(torch.float64, SMALL))).all())
    assert torch.equal(svd.s, svd.s.sort(descending=True).values)


def test_power_iterations_and_oversampling_come_nearer_to_the_best() -> None:
    delta = matrix(SPECTRA["harmonic"])

    def error(**settings: int) -> float:
        # The mean over draws: a single one may be lucky.
        svds = [randomised_svd(delta, 8, generator=generator(seed), **settings) for seed in range(8)]
        return sum(float((delta - product(svd)).norm()) for svd in svds) / len(svds)

    lower = float(SPECTRA["harmonic"][8:].norm()) * (1 - tolerance(torch.float64, SMALL))
    assert lower <= error() < error(power_iterations=1) < error(power_iterations=0)
    assert error() < error(oversampling=0)


def test_after_a_gap_it_is_the_best_approximation() -> None:
    # What is left of the tail in Q falls with the fifth power of the gap: to nothing in float64.
    singular = torch.cat([torch.arange(5, 0, -1), torch.full((60,), 1e-4)]).double()
    delta = matrix(singular)
    svd = randomised_svd(delta, 5, generator=generator(0))
    assert_close(product(svd), best(delta, 5), torch.float64, SMALL)
    assert_close(svd.s, singular[:5], torch.float64, SMALL)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exactly_low_rank_comes_back_to_rounding(dtype: torch.dtype) -> None:
    delta = matrix(torch.logspace(0, -2, 6, dtype=torch.float64)).to(dtype)
    svd = randomised_svd(delta, 6, generator=generator(0))
    assert {part.dtype for part in (svd.u, svd.s, svd.v)} == {torch.float64}
    assert_close(product(svd), best(delta, 6), dtype, SMALL)
    # What is left is a difference of squares, so its root is known to the root of a rounding.
    left = max(total_energy(delta) - float(svd.s.square().sum()), 0.0) / total_energy(delta)
    assert left <= max(tolerance(dtype, SMALL) ** 2, tolerance(torch.float64, SMALL))


@pytest.mark.parametrize("rank", [1, 20, 25, 30, 99])
def test_wide_enough_it_is_the_dense_svd(rank: int) -> None:
    delta = matrix(SPECTRA["flat"][:30].cumsum(0).flip(0), 40, 30)
    svd = randomised_svd(delta, rank, oversampling=29, generator=generator(0))
    assert len(svd.s) == min(rank, 30)
    assert_close(svd.s, torch.linalg.svdvals(delta)[:rank], torch.float64, 40)
    assert_close(product(svd), best(delta, rank), torch.float64, 40)


def test_what_is_left_out_is_known_exactly() -> None:
    delta = matrix(SPECTRA["harmonic"]).float()
    svd = randomised_svd(delta, 8, generator=generator(0))
    left = torch.tensor(total_energy(delta) - float(svd.s.square().sum()), dtype=torch.float64)
    assert_close(left.sqrt(), (delta.double() - product(svd)).norm(), torch.float64, SMALL, depth=8)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = matrix(SPECTRA["harmonic"])
    whole = randomised_svd(delta, 8, generator=generator(0))
    monkeypatch.setattr("rayft.squeeze.randomised_svd.BLOCK", 7 * SMALL)
    assert_close(
        product(randomised_svd(delta, 8, generator=generator(0))), product(whole), torch.float64, SMALL
    )


def test_only_the_seed_decides_the_result() -> None:
    delta = matrix(SPECTRA["flat"]).float()
    once = randomised_svd(delta, 8, generator=generator(3))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = randomised_svd(delta, 8, generator=generator(3))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip((once.u, once.s, once.v), (again.u, again.s, again.v), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(once.s, randomised_svd(delta, 8, generator=generator(4)).s)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("name", ["harmonic", "exponential"])
def test_a_share_of_the_energy_is_retained(name: str, energy: float) -> None:
    delta = matrix(SPECTRA[name])
    svd = svd_for_energy(delta, energy, generator=generator(0))
    retained = 1 - float((delta - product(svd)).square().sum()) / total_energy(delta)
    assert retained >= energy - tolerance(torch.float64, SMALL)
    shares = SPECTRA[name].square().cumsum(0) / SPECTRA[name].square().sum()
    smallest = int((shares < energy).sum()) + 1
    # Found values are a little small, and the rank is one more at most where the tail falls this fast.
    assert smallest <= len(svd.s) <= smallest + 1


def test_all_the_energy_of_a_low_rank_is_at_that_rank() -> None:
    delta = matrix(torch.ones(20, dtype=torch.float64))
    assert len(svd_for_energy(delta, 1.0, generator=generator(0)).s) == 20
    full = svd_for_energy(matrix(SPECTRA["harmonic"]), 1.0, generator=generator(0))
    assert len(full.s) == SMALL


def test_no_update_has_rank_one() -> None:
    svd = svd_for_energy(torch.zeros(50, 40), 0.9, generator=generator(0))
    assert svd.s.tolist() == [0.0]
    assert bool(torch.isfinite(randomised_svd(torch.zeros(50, 40), 4, generator=generator(0)).u).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_refused(value: float) -> None:
    delta = torch.ones(40, 30)
    delta[3, 4] = value
    for find in (lambda: randomised_svd(delta, 4, generator=generator(0)),
                 lambda: svd_for_energy(delta, 0.9, generator=generator(0))):  # fmt: skip
        with pytest.raises(SqueezeError, match=r"holds NaN or Inf; train again"):
            find()


def test_large_numbers_are_finite() -> None:
    assert total_energy(torch.full((2, 2), 1e30)) == pytest.approx(4e60)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, "rank 0 is not positive"),
        ({"rank": 2, "oversampling": -1}, "can't be negative"),
        ({"rank": 2, "power_iterations": -1}, "can't be negative"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, int], match: str) -> None:
    with pytest.raises(SqueezeError, match=match):
        randomised_svd(torch.ones(4, 4), generator=generator(0), **settings)


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.5])
def test_impossible_energies_are_refused(energy: float) -> None:
    with pytest.raises(SqueezeError, match=r"not in \(0, 1\]"):
        svd_for_energy(torch.ones(4, 4), energy, generator=generator(0))

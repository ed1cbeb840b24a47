"""Annealing's schedule, and its maps against dense algebra."""

from __future__ import annotations

import math

import pytest
import torch

from rayft.config import parse
from rayft.errors import ConfigError
from rayft.methods.base import LoraFactors
from rayft.numerics import assert_close, generator, tolerance
from rayft.squeeze.anneal import AnnealConfig, Moments, Phase, carry, lower_rank, revive


def random_factors(
    outputs: int, inputs: int, rank: int, scale: float, used: int | None = None
) -> LoraFactors:
    """Draw float64 factors of a rank, of which ΔW uses some columns alone."""
    draw = generator("anneal", outputs, inputs, rank)
    a = torch.randn(rank, inputs, generator=draw, dtype=torch.float64)
    b = torch.randn(outputs, rank, generator=draw, dtype=torch.float64)
    b[:, rank if used is None else used :] = 0
    return LoraFactors(a, b, scale)


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize(
    ("settings", "source", "expected"),
    [
        ({"rank": 8}, 64, (64, 32, 16, 8)),
        ({"rank": 3}, 20, (20, 11, 6, 3)),
        ({"rank": 4}, 5, (5, 4)),
        ({"rank": 1}, 8, (8, 4, 2, 1)),
        ({"rank": 8, "stages": 2}, 64, (64, 8)),
        ({"rank": 8, "stages": 8, "schedule": "linear"}, 64, (64, 56, 48, 40, 32, 24, 16, 8)),
        ({"rank": 8, "ranks": [20, 8]}, 64, (64, 20, 8)),
    ],
)
def test_ranks_fall_from_the_first_to_the_last(
    settings: dict[str, object], source: int, expected: tuple[int, ...]
) -> None:
    assert parse(AnnealConfig, settings).ranks_from(source) == expected


def test_halving_never_repeats_a_rank() -> None:
    for source in range(2, 130):
        for rank in range(1, source):
            found = AnnealConfig(rank=rank).ranks_from(source)
            assert found[0] == source
            assert found[-1] == rank


@pytest.mark.parametrize("steps", [4, 10, 37, 1000])
@pytest.mark.parametrize("share", ["equal", "by_rank"])
def test_phases_share_all_steps(steps: int, share: str) -> None:
    config = AnnealConfig.model_validate({"rank": 8, "stages": 2, "steps": share})
    found = config.plan(24, steps, 0)
    assert [phase.rank for phase in found] == [24, 8]
    assert found[0].first == 0
    assert found[0].end == found[1].first
    assert found[1].end == steps
    wanted = steps * (1 / 2 if share == "equal" else 24 / 32)
    assert abs(found[0].end - wanted) <= 0.5


@pytest.mark.parametrize(
    ("settings", "warmups"),
    [
        ({}, [3, 0, 0]),
        ({"moments": "reset"}, [3, 3, 3]),
        ({"moments": "reset", "warmup": 1}, [3, 1, 1]),
        ({"warmup": 2}, [3, 2, 2]),
    ],
)
def test_later_phases_warm_up_with_reset_moments_or_when_asked_to(
    settings: dict[str, object], warmups: list[int]
) -> None:
    config = AnnealConfig.model_validate({"rank": 2, **settings})
    plan = config.plan(8, 12, 3)
    assert plan == [
        Phase(4 * i, 4 * i + 4, warmup, rank)
        for i, (warmup, rank) in enumerate(zip(warmups, (8, 4, 2), strict=True))
    ]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, "greater than or equal to 1"),
        ({"rank": 2, "stages": 1}, "greater than or equal to 2"),
        ({"rank": 2, "ranks": [4, 2], "stages": 3}, "ranks replace stages and schedule; leave those out"),
        ({"rank": 2, "ranks": [4, 2], "schedule": "linear"}, "ranks replace stages and schedule"),
        ({"rank": 2, "ranks": [4, 3]}, r"must end with rank \(2\), and are \[4, 3\]"),
        ({"rank": 2, "ranks": []}, r"must end with rank \(2\)"),
        ({"rank": 2, "ranks": [4, 4, 2]}, r"must fall from one to the next, and are \[4, 4, 2\]"),
        ({"rnak": 2}, "did you mean 'rank'"),
    ],
)
def test_settings_that_make_no_schedule(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(AnnealConfig, settings)


@pytest.mark.parametrize(
    ("settings", "steps", "warmup", "match"),
    [
        ({"rank": 16}, 40, 3, r"rank 16, which is not below method.rank \(16\): raise method.rank"),
        ({"rank": 2, "ranks": [20, 2]}, 40, 3, r"goes to rank 20, which is not below method.rank \(16\)"),
        ({"rank": 13, "stages": 5}, 40, 3, "some of them twice: take fewer stages, or give anneal.ranks"),
        ({"rank": 2}, 3, 0, r"of optim.steps \(3\) the phase of rank 4 gets 0, fewer than one: raise"),
        ({"rank": 2}, 7, 3, "rank 16 gets 2, fewer than its warm-up of 3: .*lower optim.warmup"),
        (
            {"rank": 2, "warmup": 9},
            32,
            3,
            "rank 8 gets 8, fewer than its warm-up of 9: .*lower anneal.warmup",
        ),
    ],
)
def test_schedules_that_do_not_fit_a_run(
    settings: dict[str, object], steps: int, warmup: int, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        AnnealConfig.model_validate(settings).plan(16, steps, warmup)


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(33, 17, 5), (8, 40, 8), (40, 8, 8)])
@pytest.mark.parametrize("scale", [2.0, 16 / 5**0.5])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_update_becomes_the_best_of_its_rank(
    outputs: int, inputs: int, rank: int, scale: float, k: int
) -> None:
    factors = random_factors(outputs, inputs, rank, scale)
    change = lower_rank(factors, k)
    assert change.factors.scale == scale
    assert change.factors.rank == k
    # Where two singular values are close, rounding turns their vectors into each other (Wedin).
    s = [*torch.linalg.svdvals(factors.delta())[: k + 1].tolist(), 0.0]
    turn = math.ceil(s[0] / (s[k - 1] - s[k]))
    best = truncated(factors.delta(), k)
    assert_close(change.factors.delta(), best, torch.float64, outputs + inputs, depth=turn)
    assert_close(change.factors.a, change.p_a @ factors.a, torch.float64, outputs, depth=rank)
    assert_close(change.factors.b, factors.b @ change.p_b, torch.float64, outputs, depth=rank)


@pytest.mark.parametrize("k", [2, 5])
def test_first_moments_are_the_gradients_of_the_new_factors(k: int) -> None:
    factors = random_factors(21, 13, 5, 0.5)
    draw = generator("gradient")
    weight = torch.randn(21, 13, generator=draw, dtype=torch.float64)
    full = torch.randn(21, 13, generator=draw, dtype=torch.float64)

    def gradients(of: LoraFactors) -> tuple[torch.Tensor, torch.Tensor]:
        """Differentiate a function of W whose gradient there is `full`, by autograd."""
        a, b = of.a.clone().requires_grad_(), of.b.clone().requires_grad_()
        ((weight + of.scale * (b @ a)) * full).sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        return a.grad, b.grad

    grad_a, grad_b = gradients(factors)
    change = lower_rank(factors, k)
    found_a, found_b = carry(change, Moments(grad_a, grad_a.square()), Moments(grad_b, grad_b.square()))
    expected_a, expected_b = gradients(change.factors)
    assert_close(found_a.mean, expected_a, torch.float64, 21, depth=5)
    assert_close(found_b.mean, expected_b, torch.float64, 21, depth=5)
    assert found_a.square.shape == found_a.mean.shape
    assert bool((found_a.square >= 0).all())
    assert bool((found_b.square >= 0).all())


def test_second_moments_are_right_where_columns_are_independent() -> None:
    # One number at a time: its square through the map is the map's entry squared times its own.
    factors = random_factors(6, 7, 3, 1.0)
    change = lower_rank(factors, 2)
    for column in range(3):
        grad_b = torch.zeros(6, 3, dtype=torch.float64)
        grad_b[:, column] = torch.arange(1, 7)
        grad_a = torch.zeros(3, 7, dtype=torch.float64)
        grad_a[column] = torch.arange(1, 8)
        found_a, found_b = carry(change, Moments(grad_a, grad_a.square()), Moments(grad_b, grad_b.square()))
        assert_close(found_a.square, found_a.mean.square(), torch.float64, 7, depth=3)
        assert_close(found_b.square, found_b.mean.square(), torch.float64, 7, depth=3)


def test_dead_columns_can_learn_and_change_nothing() -> None:
    factors = random_factors(20, 15, 6, 2.0, used=3)
    change = lower_rank(factors, 5)
    assert change.alive.tolist() == [True] * 3 + [False] * 2
    assert_close(change.factors.delta(), factors.delta(), torch.float64, 20)
    dead_a, dead_b = change.factors.a[3:], change.factors.b[:, 3:]
    assert not dead_b.any()
    norms = change.factors.a[:3].norm(dim=1)
    assert_close(dead_a.norm(dim=1), norms.median().expand(2), torch.float64, 15)
    # Orthogonal to each other and to the living rows.
    gram = change.factors.a @ change.factors.a.t()
    assert_close(gram, gram.diag().diag(), torch.float64, 15, depth=6)
    ones = Moments(torch.ones_like(factors.a), torch.ones_like(factors.a))
    for_a, for_b = carry(change, ones, Moments(torch.ones_like(factors.b), torch.ones_like(factors.b)))
    assert not for_a.mean[3:].any()
    assert not for_b.mean[:, 3:].any()
    assert_close(for_a.square[3], for_a.square[:3].mean(0), torch.float64, 3)
    assert_close(for_b.square[:, 4], for_b.square[:, :3].mean(1), torch.float64, 3)


def test_an_update_of_zero_keeps_its_rows() -> None:
    factors = random_factors(9, 8, 4, 1.0, used=0)
    change = lower_rank(factors, 2)
    assert not change.alive.any()
    assert not change.factors.delta().any()
    expected = factors.a.norm(dim=1).median().expand(2)
    assert_close(change.factors.a.norm(dim=1), expected, torch.float64, 8)
    zeros = Moments(torch.zeros_like(factors.a), torch.zeros_like(factors.a))
    for_a, for_b = carry(change, zeros, Moments(torch.zeros_like(factors.b), torch.zeros_like(factors.b)))
    assert not any(part.any() for part in (for_a.mean, for_a.square, for_b.mean, for_b.square))


def test_rounding_of_float32_factors_is_no_living_column() -> None:
    exact = random_factors(30, 25, 6, 1.0)
    # B's last columns are sums of the others, but for rounding.
    b = exact.b.clone()
    b[:, 4:] = b[:, :4] @ torch.randn(4, 2, generator=generator("mix"), dtype=torch.float64)
    change = lower_rank(LoraFactors(exact.a.float(), b.float(), 1.0), 6)
    assert change.alive.tolist() == [True] * 4 + [False] * 2
    assert change.factors.a.dtype == torch.float32
    assert_close(change.factors.delta(), (b @ exact.a).float(), torch.float32, 30, depth=6)


def test_columns_that_are_zero_in_both_factors_are_revived() -> None:
    factors = random_factors(12, 10, 5, 1.0, used=3)
    a = factors.a.clone()
    a[4] = 0
    given = LoraFactors(a, factors.b, 1.0)
    found = revive(given)
    # B's zero with a row of A learns as it is.
    assert torch.equal(found.a[:4], a[:4])
    assert found.b is given.b
    assert_close(found.a[4].norm(), a[:4].norm(dim=1).median(), torch.float64, 10)
    assert float((a[:4] @ found.a[4]).norm()) <= tolerance(torch.float64, 10, depth=5) * float(
        a.norm() * found.a[4].norm()
    )
    assert revive(found) is found
    assert torch.equal(revive(given).a, found.a)


def test_what_is_zero_altogether_starts_with_rows_as_long_as_fresh_ones() -> None:
    found = revive(LoraFactors(torch.zeros(3, 8), torch.zeros(6, 3), 1.0))
    assert_close(found.a.norm(dim=1), torch.full((3,), 1 / math.sqrt(3)), torch.float32, 8)
    assert not found.b.any()

"""The factored SVD against a dense one, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from rayft.methods.base import LoraFactors
from rayft.numerics import assert_close, generator, tolerance
from rayft.squeeze.factored_svd import factored_svd, factored_svds, sorted_factors, thin_qr


def random_factors(outputs: int, inputs: int, rank: int, scale: float, dtype: torch.dtype) -> LoraFactors:
    draw = generator("factors", outputs, inputs, rank)
    a = torch.randn(rank, inputs, generator=draw, dtype=torch.float64)
    b = torch.randn(outputs, rank, generator=draw, dtype=torch.float64)
    return LoraFactors(a.to(dtype), b.to(dtype), scale)


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(33, 17, 5), (8, 40, 8), (40, 8, 12), (7, 7, 1)])
@pytest.mark.parametrize("scale", [2.0, 0.25])
def test_the_result_equals_the_dense_svd(outputs: int, inputs: int, rank: int, scale: float) -> None:
    factors = random_factors(outputs, inputs, rank, scale, torch.float32)
    dense = factors.scale * (factors.b.double() @ factors.a.double())
    svd = factored_svd(factors)
    expected = torch.linalg.svdvals(dense)[: len(svd.s)]
    assert_close(svd.s, expected, torch.float64, rank)
    assert_close((svd.u * svd.s) @ svd.v.t(), dense, torch.float64, rank)


def test_a_condition_number_of_a_million_costs_no_accuracy() -> None:
    draw = generator("condition")
    u, _ = torch.linalg.qr(torch.randn(30, 6, generator=draw, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(20, 6, generator=draw, dtype=torch.float64))
    s = torch.logspace(0, -6, 6, dtype=torch.float64)
    found = factored_svd(LoraFactors((s[:, None] * v.t()), u, 1.0)).s
    # Each value by itself, for a norm over all would hide the smallest. What rounding does to the
    # matrix moves no singular value by more than its norm, the largest value (Weyl).
    allowed = tolerance(torch.float64, 30) * float(s[0])
    for value, expected in zip(found, s, strict=True):
        assert abs(float(value - expected)) <= allowed


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_every_prefix_is_the_best_of_its_rank(rank: int) -> None:
    factors = random_factors(31, 19, 5, 0.5, torch.float64)
    dense = factors.delta()
    found = sorted_factors(factored_svd(factors), factors.scale, torch.float64)
    prefix = LoraFactors(found.a[:rank], found.b[:, :rank], found.scale)
    u, s, vt = torch.linalg.svd(dense)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert_close(prefix.delta(), best, torch.float64, 31)
    assert prefix.scale == factors.scale
    assert_close(found.b.norm(), found.a.norm(), torch.float64, 31)


@pytest.mark.parametrize("columns", [1, 4, 9])
@pytest.mark.parametrize("condition", [1.0, 1e6])
def test_cholesky_twice_is_as_good_as_householder(columns: int, condition: float) -> None:
    draw = generator("qr", columns)
    q, _ = torch.linalg.qr(torch.randn(3, 50, columns, generator=draw, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(3, columns, columns, generator=draw, dtype=torch.float64))
    x = (q * torch.logspace(0, -math.log10(condition), columns, dtype=torch.float64)) @ right
    found_q, found_r = thin_qr(x, by_cholesky=True)
    eye = torch.eye(columns, dtype=torch.float64).expand(3, -1, -1)
    assert_close(found_q @ found_r, x, torch.float64, 50)
    assert_close(found_q.mT @ found_q, eye, torch.float64, 50)
    assert torch.equal(found_r, found_r.triu())


@pytest.mark.parametrize("case", ["dependent", "zero", "wide", "condition"])
def test_householder_is_used_where_cholesky_fails(case: str) -> None:
    x = torch.randn(2, 30, 6, generator=generator(case), dtype=torch.float64)
    if case == "dependent":
        x[1, :, 5] = x[1, :, 0] - x[1, :, 3]
    elif case == "zero":
        x[1] = 0
    elif case == "wide":
        x = x.mT
    else:
        x[1, :, 5] = x[1, :, 0] + 1e-9 * x[1, :, 5]
    q, r = thin_qr(x, by_cholesky=True)
    assert_close(q @ r, x, torch.float64, 30)
    eye = torch.eye(q.shape[-1], dtype=torch.float64).expand(2, -1, -1)
    assert_close(q.mT @ q, eye, torch.float64, 30)


def test_a_stack_is_decomposed_as_each_alone() -> None:
    many = [
        LoraFactors(
            torch.randn(4, 17, generator=generator("a", i)),
            torch.randn(33, 4, generator=generator("b", i)),
            i + 0.5,
        )
        for i in range(3)
    ]
    for factors, svd in zip(many, factored_svds(many), strict=True):
        alone = factored_svd(factors)
        assert_close(svd.s, alone.s, torch.float64, 4)
        assert_close((svd.u * svd.s) @ svd.v.t(), (alone.u * alone.s) @ alone.v.t(), torch.float64, 4)


def test_a_scale_below_zero_keeps_its_sign() -> None:
    factors = random_factors(9, 8, 3, -1.5, torch.float64)
    found = sorted_factors(factored_svd(factors), factors.scale, torch.float64)
    assert found.scale == -1.5
    assert_close(found.delta(), factors.delta(), torch.float64, 9)

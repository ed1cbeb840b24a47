"""The tolerance rule accepts errors of rounding and no others; seeds are the same on all machines."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from rayft.numerics import (
    DTYPES,
    assert_close,
    derive_seed,
    fastest_cpu_dtype,
    generator,
    relative_error,
    seed_everything,
    tolerance,
)

ALL = list(DTYPES.values())


def test_the_tolerance_is_that_of_its_docstring() -> None:
    eps = torch.finfo(torch.float32).eps
    assert tolerance(torch.float32, 100, depth=3) == 2 * 3 * eps + 4 * 10 * eps
    half = torch.finfo(torch.bfloat16).eps
    assert tolerance(torch.bfloat16, 100) == 2 * half + 4 * 10 * eps


@pytest.mark.parametrize("dtype", ALL)
def test_the_tolerance_grows_with_length_and_depth(dtype: torch.dtype) -> None:
    assert tolerance(dtype, 4) < tolerance(dtype, 400)
    assert tolerance(dtype, 4, depth=1) < tolerance(dtype, 4, depth=2)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_errors_of_rounding_stay_within_the_tolerance(dtype: torch.dtype, length: int) -> None:
    random_numbers = generator("tolerance", length)
    left = torch.empty(9, length, dtype=dtype).normal_(generator=random_numbers)
    right = torch.empty(length, 9, dtype=dtype).normal_(generator=random_numbers)
    assert_close(left @ right, left.double() @ right.double(), dtype, length)


@pytest.mark.parametrize("dtype", ALL)
def test_a_wrong_term_exceeds_the_tolerance(dtype: torch.dtype) -> None:
    random_numbers = generator("wrong")
    left = torch.empty(9, 16, dtype=dtype).normal_(generator=random_numbers)
    right = torch.empty(16, 9, dtype=dtype).normal_(generator=random_numbers)
    with pytest.raises(AssertionError, match=r"relative error .*, allowed "):
        assert_close(left[:, :15] @ right[:15], left.double() @ right.double(), dtype, 16)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_never_pass(bad: float) -> None:
    expected = torch.ones(3)
    actual = torch.tensor([1.0, bad, 1.0])
    with pytest.raises(AssertionError):
        assert_close(actual, expected, torch.float32, 1)
    with pytest.raises(AssertionError):
        assert_close(actual, actual, torch.float32, 1)


def test_shapes_must_be_equal_not_broadcastable() -> None:
    with pytest.raises(AssertionError, match=r"shapes differ: \(1, 3\) and \(3,\)"):
        assert_close(torch.ones(1, 3), torch.ones(3), torch.float32, 1)


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    leaf = torch.ones(2, requires_grad=True)
    assert relative_error(leaf, leaf) == 0.0


def test_seeds_differ_by_every_part_and_fit_63_bits() -> None:
    seeds = {derive_seed(*parts) for parts in ((0,), (1,), ("a", "b"), ("ab",), ("b", "a"), (0, "a"), ())}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_in_another_process() -> None:
    code = "from rayft.numerics import derive_seed; print(derive_seed('layer.0', 7))"
    # A salted hash() would differ here.
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == derive_seed("layer.0", 7)


def test_generators_are_independent_of_the_global_state() -> None:
    first = torch.rand(4, generator=generator("a", 1))
    torch.rand(10)
    assert torch.equal(first, torch.rand(4, generator=generator("a", 1)))
    assert not torch.equal(first, torch.rand(4, generator=generator("a", 2)))


@pytest.mark.parametrize("seed", [0, 1, derive_seed("large")])
def test_seed_everything_seeds_all_three(seed: int) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    seed_everything(seed)
    first = draw()
    seed_everything(seed)
    assert draw() == first
    seed_everything(seed + 1)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_the_fastest_dtype_is_the_one_that_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest_cpu_dtype(size=16, repeats=2) in (torch.float32, torch.bfloat16)
    # Two readings a repeat: float32 takes 2 s, then bfloat16 takes 1 s.
    ticks = iter([0.0, 2.0, 2.0, 3.0])
    monkeypatch.setattr("rayft.numerics.time.perf_counter", lambda: next(ticks))
    assert fastest_cpu_dtype(size=4, repeats=1) == torch.bfloat16

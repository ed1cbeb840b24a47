"""The one tolerance rule, seeds, and the compute dtype.

Tolerance: results that were stored in `dtype` after `depth` roundings and summed over `length`
terms differ from the exact ones, relative to the norm, by at most

    2·depth·eps(dtype) + 4·√length·eps(accumulator),      accumulator = float32 for 16-bit types

The first term is storage, the second random-walk growth of the summation error. No test types a
tolerance by hand.
"""

from __future__ import annotations

import hashlib
import math
import random
import time

import numpy as np
import torch

__all__ = [
    "assert_close",
    "derive_seed",
    "fastest_cpu_dtype",
    "generator",
    "relative_error",
    "seed_everything",
    "tolerance",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def tolerance(dtype: torch.dtype, length: int, depth: int = 1) -> float:
    """Give the largest relative error (in the Frobenius norm) that rounding alone explains."""
    accumulator = torch.float32 if torch.finfo(dtype).bits < 32 else dtype
    return 2 * depth * torch.finfo(dtype).eps + 4 * math.sqrt(length) * torch.finfo(accumulator).eps


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute ‖actual − expected‖ / ‖expected‖ in float64 (the plain norm where expected is 0)."""
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = float((actual - expected).norm())
    scale = float(expected.norm())
    return difference / scale if scale else difference


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, length: int, depth: int = 1
) -> None:
    """Assert that two tensors agree within `tolerance(dtype, length, depth)`; NaN never does.

    Raises:
        AssertionError: with the error and what was allowed.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    error, allowed = relative_error(actual, expected), tolerance(dtype, length, depth)
    if not error <= allowed:
        raise AssertionError(f"relative error {error:.3e}, allowed {allowed:.3e}")


def derive_seed(*parts: object) -> int:
    """Derive a 63-bit seed from any parts, the same on every machine and run."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Make a CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries still read the global state)
    torch.manual_seed(seed)


def fastest_cpu_dtype(size: int = 512, repeats: int = 5) -> torch.dtype:
    """Time one product in float32 and bfloat16 and return the faster dtype of this CPU.

    bfloat16 wins where the CPU has AMX or AVX512-BF16 and loses badly elsewhere, so it is
    measured (about 50 ms), not guessed from a model name.
    """
    best: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        left @ right
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        best[dtype] = min(times)
    return min(best, key=lambda dtype: best[dtype])

"""The tolerance rule of all tests, seeds, the fastest dtype of a CPU, and shapes and copies of tensors.

Tolerance: results that are summed over `length` terms and stored in `dtype` after `depth` roundings differ
from the exact results, relative to their norm, by at most

    2·depth·eps(dtype) + 4·√length·eps(accumulator),      accumulator = float32 for 16-bit types

The first term is the error of storage. The second is the error of summation, which grows as a random walk.
All tests use this rule and have no tolerances of their own.
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
    "moved",
    "relative_error",
    "reshaped",
    "seed_everything",
    "tolerance",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def tolerance(dtype: torch.dtype, length: int, depth: int = 1) -> float:
    """Return the largest relative error, in the Frobenius norm, that rounding alone explains."""
    accumulator = torch.float32 if torch.finfo(dtype).bits < 32 else dtype
    return 2 * depth * torch.finfo(dtype).eps + 4 * math.sqrt(length) * torch.finfo(accumulator).eps


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖, computed in float64; ‖actual‖ if `expected` is 0."""
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = float((actual - expected).norm())
    scale = float(expected.norm())
    return difference / scale if scale else difference


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, length: int, depth: int = 1
) -> None:
    """Assert that two tensors agree within `tolerance(dtype, length, depth)`. NaN agrees with nothing.

    Raises:
        AssertionError: with the error and the tolerance.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    error, allowed = relative_error(actual, expected), tolerance(dtype, length, depth)
    if not error <= allowed:
        raise AssertionError(f"relative error {error:.3e}, allowed {allowed:.3e}")


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends only on `parts`, so it is the same on every machine and run."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator that is seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries still read the global state)
    if torch.cuda.is_initialized():
        # `torch.manual_seed` also keeps a stack trace for each kind of device that is not there.
        torch.default_generator.manual_seed(seed)
        torch.cuda.manual_seed_all(seed)
    else:
        torch.manual_seed(seed)


def fastest_cpu_dtype(size: int = 512, repeats: int = 5) -> torch.dtype:
    """Return the faster of float32 and bfloat16 on this CPU, measured with a matrix product.

    bfloat16 is faster on CPUs with AMX or AVX512-BF16, and much slower on all others. The measurement takes
    about 50 ms, and is more reliable than a list of CPU names.

    Args:
        size: rows and columns of the matrices.
        repeats: number of products timed for each dtype; the fastest counts.
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


def reshaped(y_NO: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the result of an autograd function, computed for N tokens, in the shape of its input.

    The result is not a view. Autograd refuses to change views that an autograd function returns, and models
    with parallel layers, such as Falcon, add to the outputs of their layers in place.

    Args:
        y_NO: the result, (N × O).
        x: the input, (…, I), of N tokens.

    Returns:
        (…, O).
    """
    found: torch.Tensor = torch.ops.aten._unsafe_view(y_NO, (*x.shape[:-1], y_NO.shape[-1]))
    return found


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move a tensor to a device without waiting for what the device has to do before.

    A copy from memory that is not pinned may wait for it.
    """
    if tensor.is_cpu and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

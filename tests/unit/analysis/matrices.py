"""Random matrices, and a comparison of numbers, for the tests of spectra and of intruders."""

from __future__ import annotations

import torch

from rayft.numerics import assert_close, generator


def gaussian(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=generator("spectral", *size), dtype=torch.float64)


def orthonormal(outputs: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(outputs, columns))[0]


def assert_equal(actual: float, expected: float, roundings: int = 40) -> None:
    wide = torch.float64
    assert_close(torch.tensor(actual, dtype=wide), torch.tensor(expected, dtype=wide), wide, roundings)

"""How sure a score is, and whether two scores differ.

Scores of one item are 0 or 1 (right, wrong) or anything between (partial credit); the two kinds have
their own exact or nearly exact methods. n is the number of items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayft.errors import DataError

__all__ = ["Paired", "interval", "paired"]

RESAMPLES = 10_000
BLOCK = 2_000_000
"""Numbers that a block of resamples holds at most (16 MB)."""

EXACT = 12
"""Differences up to which all 2ⁿ signs are tried."""

Z = 1.959963984540054
"""97.5% quantile of the normal distribution."""


@dataclass(frozen=True)
class Paired:
    """Whether two models differ on the same items."""

    difference: float
    """Mean of the first less mean of the second."""
    ci_low: float
    ci_high: float
    """95% interval of the difference."""
    p_value: float
    """Probability of a difference at least this large, if there were none; two-sided."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Give the 95% interval of a mean.

    Of 0/1 values it is Wilson's score interval (J. Am. Stat. Assoc. 22, 1927), which holds for few items
    and near 0 or 1, where the normal one does not; of others the percentile bootstrap (Efron &
    Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13), with a fixed seed.

    Raises:
        DataError: if there are no values.
    """
    array = _array(values)
    return _wilson(array) if _binary(array) else _bootstrap(array)


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare two models' scores of the same items, in the same order.

    The interval is the percentile bootstrap of the items' differences. The p-value is McNemar's exact
    test (Psychometrika 12, 1947: of the items on which just one is right, each model should get half)
    for 0/1 scores, else the sign-flip permutation test (Fisher, The Design of Experiments, 1935, §21).

    Raises:
        DataError: if there are no scores, or not equally many.
    """
    first, second = _array(a), _array(b)
    if first.shape != second.shape:
        raise DataError(
            f"{len(first)} and {len(second)} scores can't be paired: score both on the same examples"
        )
    difference = first - second
    low, high = _bootstrap(difference)
    exact = _binary(first) and _binary(second)
    p_value = _mcnemar(difference) if exact else _sign_flip(difference)
    return Paired(float(difference.mean()), low, high, p_value)


def _array(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise DataError("there are no scores to take a mean of; score one example or more")
    return array


def _binary(array: NDArray[np.float64]) -> bool:
    return bool(np.isin(array, (0.0, 1.0)).all())


def _wilson(array: NDArray[np.float64]) -> tuple[float, float]:
    n, share = len(array), float(array.mean())
    centre = share + Z**2 / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # At 0 and n right answers the limits are 0 and 1, which rounding would miss.
    low = 0.0 if share == 0 else (centre - half) / (1 + Z**2 / n)
    high = 1.0 if share == 1 else (centre + half) / (1 + Z**2 / n)
    return low, high


def _bootstrap(array: NDArray[np.float64]) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    n = len(array)
    rows = max(1, BLOCK // n)
    means = [
        array[rng.integers(0, n, (min(rows, RESAMPLES - start), n))].mean(axis=1)
        for start in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def _mcnemar(difference: NDArray[np.float64]) -> float:
    from scipy.stats import binomtest

    only_first, discordant = int((difference > 0).sum()), int((difference != 0).sum())
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def _sign_flip(difference: NDArray[np.float64]) -> float:
    moved = difference[difference != 0]
    n = len(moved)
    observed = abs(moved.sum())
    # Sums that are equal but for rounding count as equal.
    reached = observed * (1 - 1e-12)
    if n <= EXACT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ moved) >= reached).mean())
    rng = np.random.default_rng(0)
    rows = max(1, BLOCK // n)
    count = 0
    for start in range(0, RESAMPLES, rows):
        signs = rng.integers(0, 2, (min(rows, RESAMPLES - start), n)) * 2 - 1
        count += int((np.abs(signs @ moved) >= reached).sum())
    # The observed signs are one of the possible ones, so p is never 0 (Phipson & Smyth, 2010).
    return (count + 1) / (RESAMPLES + 1)

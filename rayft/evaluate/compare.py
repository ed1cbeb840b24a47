"""Confidence intervals of scores, and tests of whether two scores differ.

The score of one item is 0 or 1 (wrong or right), or anything between (partial credit). Both kinds have their
own exact or nearly exact methods. n is the number of items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayft.errors import DataError

__all__ = ["Mean", "Paired", "interval", "over_seeds", "paired"]

RESAMPLES = 10_000
BLOCK = 2_000_000
"""Largest number of values in a block of resamples (16 MB)."""

FEW = 20
"""Number of partial scores below which the bootstrap's interval is clearly too narrow."""

EXACT = 12
"""Largest number of differences for which all 2ⁿ signs are tried."""

HALVINGS = 54
"""Number of halvings after which an end of an interval within [-1, 1] is exact to the last bit of a number
near 1."""

Z = 1.959963984540054
"""97.5% quantile of the normal distribution."""


@dataclass(frozen=True)
class Paired:
    """A comparison of two models on the same items."""

    difference: float
    """Mean of the first minus mean of the second."""
    ci_low: float
    ci_high: float
    """95% interval of the difference."""
    p_value: float
    """Probability of a difference at least this large if the models were equally good; two-sided."""


@dataclass(frozen=True)
class Mean:
    """A mean, or a difference of two, over tasks, seeds and items."""

    value: float
    ci_low: float
    ci_high: float
    """95% interval."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of a mean.

    For 0/1 values it is Wilson's score interval (J. Am. Stat. Assoc. 22, 1927), which is valid for few items
    and near 0 or 1, where the normal interval is not. For other values it is the percentile bootstrap (Efron
    & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13), with a fixed seed. If they are few or all
    equal, it is Wilson's too, which is rather too wide than too narrow for them: no values from 0 to 1 have a
    larger variance than 0/1 values of the same mean.

    Args:
        values: scores from 0 to 1.

    Raises:
        DataError: if there are no values.
    """
    array = _array(values)
    return _wilson(array) if _few(array) or _binary(array) else _bootstrap(array)


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare two models' scores of the same items, in the same order.

    For 0/1 scores the interval is Tango's score interval (Stat. Med. 17, 1998), which is for differences what
    Wilson's is for scores. For other scores it is the percentile bootstrap of the items' differences. If
    these are few or all equal, it is Tango's too, which is rather too wide than too narrow for them.

    The p-value is that of McNemar's exact test for 0/1 scores (Psychometrika 12, 1947: of the items on which
    only one model is right, each model should get half), and otherwise that of the sign-flip permutation test
    (Fisher, The Design of Experiments, 1935, §21).

    Raises:
        DataError: if there are no scores, or the two models have different numbers of them.
    """
    first, second = _array(a), _array(b)
    if first.shape != second.shape:
        raise DataError(
            f"{len(first)} and {len(second)} scores can't be paired: score both on the same examples"
        )
    difference = first - second
    p_value = _mcnemar(difference) if _binary(first) and _binary(second) else _sign_flip(difference)
    return Paired(float(difference.mean()), *_paired_interval(first, second), p_value)


def over_seeds(
    first: Sequence[NDArray[np.float64]], second: Sequence[NDArray[np.float64]] | None = None
) -> Mean:
    """Return the mean score over tasks, or the difference of two methods, for new draws of seeds and items.

    The interval is the percentile bootstrap: for each task, seeds and items are resampled, crossed (Owen,
    Ann. Appl. Stat. 1, 2007). Of S seeds S - 1 are drawn, which makes the seeds' part of the variance
    unbiased (Rao & Wu, J. Am. Stat. Assoc. 83, 1988); with one seed, that part is left out. Between two
    methods the items are paired and the seeds are not, because different methods draw different numbers from
    the same seed.

    Of one task and one seed, the interval is that of `interval` or `paired`. Of one task with few items, or
    equal ones, for which the bootstrap's is too narrow, it is the wider one of both.

    Args:
        first: for each task the scores, shape (seeds, items).
        second: the scores of the other method, on the same tasks and items.

    Raises:
        DataError: if there are no scores, or they are not on the same items.
    """
    sides = [[_matrix(scores) for scores in side] for side in (first, second) if side is not None]
    shapes = [[scores.shape[1] for scores in side] for side in sides]
    if not shapes[0] or shapes[0] != shapes[-1]:
        raise DataError("scores of no task, or of other items, can't be compared: score both on the same")
    rng = np.random.default_rng(0)
    value, resampled = 0.0, np.zeros(RESAMPLES)
    for scores in zip(*sides, strict=True):
        n = scores[0].shape[1]
        items = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
        for sign, one in zip((1, -1), scores, strict=False):
            count = len(one)
            draws = max(1, count - 1)
            seeds = rng.multinomial(draws, np.full(count, 1 / count), RESAMPLES) / draws
            value += sign * float(one.mean())
            resampled += sign * ((seeds @ one) * items).sum(axis=1)
    low, high = map(float, np.quantile(resampled / len(first), (0.025, 0.975)))
    if len(first) == 1:
        means = [side[0].mean(axis=0) for side in sides]
        once = all(len(side[0]) == 1 for side in sides)
        if once or _few(means[0] if second is None else means[0] - means[1]):
            plain = interval(means[0].tolist()) if second is None else _paired_interval(*means)
            low, high = plain if once else (min(low, plain[0]), max(high, plain[1]))
    return Mean(value / len(first), low, high)


def _paired_interval(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float]:
    """Return the interval of the mean difference of two models' scores of the same items (see `paired`)."""
    difference, exact = first - second, _binary(first) and _binary(second)
    return _tango(difference) if exact or _few(difference) else _bootstrap(difference)


def _matrix(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise DataError(f"scores of shape {array.shape} are not (seeds, items)")
    return array


def _array(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise DataError("there are no scores to take a mean of; score one example or more")
    return array


def _binary(array: NDArray[np.float64]) -> bool:
    return bool(np.isin(array, (0.0, 1.0)).all())


def _few(array: NDArray[np.float64]) -> bool:
    """Return whether values are too few, or too equal, for the bootstrap."""
    return len(array) < FEW or bool(array.min() == array.max())


def _wilson(array: NDArray[np.float64]) -> tuple[float, float]:
    n, share = len(array), float(array.mean())
    centre = share + Z**2 / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # With 0 or n right answers a limit is exactly 0 or 1, which rounding would miss.
    low = 0.0 if share == 0 else (centre - half) / (1 + Z**2 / n)
    high = 1.0 if share == 1 else (centre + half) / (1 + Z**2 / n)
    return low, high


def _tango(difference: NDArray[np.float64]) -> tuple[float, float]:
    """Return the least and the largest mean difference that the score test of paired 0/1 scores accepts.

    A difference of 0.3 counts as 0.3 of a difference of 1: the mean is the same, and the variance no smaller.
    """
    n, mean = len(difference), float(difference.mean())
    better, worse = (float(side.clip(min=0).sum()) for side in (difference, -difference))

    def accepted(x: float) -> bool:
        # The share of items on which the second alone is right, most likely at a mean difference of x.
        linear = (2 * n - better + worse) * x - better - worse
        root = math.sqrt(max(0.0, linear**2 + 8 * n * worse * x * (1 - x)))
        share = max(0.0, (root - linear) / (4 * n))
        return abs(n * (mean - x)) <= Z * math.sqrt(n * max(0.0, 2 * share + x * (1 - x)))

    ends = []
    for end in (-1.0, 1.0):
        inside, outside = (end, end) if accepted(end) else (mean, end)
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if accepted(middle) else (inside, middle)
        ends.append(inside)
    return ends[0], ends[1]


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
    # Sums that differ only by rounding count as equal.
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
    # The observed signs count as one of the samples, so p is never 0 (Phipson & Smyth, 2010).
    return (count + 1) / (RESAMPLES + 1)

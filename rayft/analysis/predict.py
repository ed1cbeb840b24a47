"""Does a measure predict the generalisation gap? Rank correlations over a sweep's runs, with intervals.

Kendall's τ_b and Spearman's ρ are computed with the gap. A run that trained further has both a larger update
and a larger gap, so two more correlations show what a measure says beyond that: Spearman's partial
correlation with the gap, the training loss held fixed, (ρxy − ρxz ρyz) / √((1 − ρxz²)(1 − ρyz²)), and ρ with
the held-out loss itself.

Intervals are percentile bootstraps that resample whole groups of runs, since the seeds of one setting are not
independent (Davison & Hinkley 1997, sec. 3.8). If an interval contains 0, the measure was not found to
predict anything. With many measures some intervals exclude 0 by chance, so the number of measures belongs
beside the table.

Shapes: n runs, R resamples of them, each a row of n indices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from rayft.analysis.record import Predictor
from rayft.errors import ReportError
from rayft.numerics import derive_seed

__all__ = ["LEAST", "Run", "correlations"]

LEAST = 3
"""With fewer runs no correlation is computed."""
LEAST_GROUPS = 6
"""With fewer settings no interval is computed: three runs are in perfect order by chance one time in three,
and resampling them shows perfect order again."""
RESAMPLES = 2000
AT_ONCE = 4_000_000
"""Pairs of runs that are compared at once, which limits memory."""

Array = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """A run's measures and its gap."""

    group: str
    """The setting, which it shares with runs that differ in their seed alone."""
    gap: float
    measures: Mapping[str, float]
    train_loss: float = math.nan
    held_out: float = math.nan
    """With `train_loss` the parts of the gap; if one is NaN, the correlations beyond the gap are NaN."""


def correlations(runs: Sequence[Run], seed: int = 0) -> list[Predictor]:
    """Correlate every measure with the gap, over the runs that have both as finite numbers.

    A measure is left out if it is the same in all runs, or if fewer than three runs have it.

    Returns:
        The strongest |ρ| first. Those without an interval come last, the ones of most runs first.

    Raises:
        ReportError: if there are fewer than three runs.
    """
    runs = [run for run in runs if math.isfinite(run.gap)]
    if len(runs) < LEAST:
        raise ReportError(
            f"a correlation needs {LEAST} or more finished runs with a gap, and there are {len(runs)}; train "
            "more runs, or more seeds"
        )
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.measures):
        mine = [run for run in runs if math.isfinite(run.measures.get(name, math.nan))]
        values = np.array([run.measures[name] for run in mine])
        others = np.array([(run.gap, run.train_loss, run.held_out) for run in mine]).reshape(-1, 3).T
        if len(mine) >= LEAST and np.ptp(values) > 0 and np.ptp(others[0]) > 0:
            found.append(_correlate(name, values, others, [run.group for run in mine], seed))
    return sorted(found, key=_strength, reverse=True)


def _strength(one: Predictor) -> tuple[bool, int, float]:
    """Return the sorting key.

    Without an interval the number of runs counts before ρ, which is easily 1 for three runs.
    """
    known = math.isfinite(one.spearman_low)
    return known, 0 if known else one.n, abs(one.spearman)


def _correlate(name: str, values: Array, others: Array, groups: Sequence[str], seed: int) -> Predictor:
    members = [np.flatnonzero(np.array(groups) == group) for group in dict.fromkeys(groups)]
    rng = np.random.default_rng(derive_seed("correlate", name, seed))
    drawn: dict[int, list[Rows]] = {}
    for _ in range(RESAMPLES if len(members) >= LEAST_GROUPS else 0):
        rows = np.concatenate([members[one] for one in rng.integers(0, len(members), len(members))])
        drawn.setdefault(len(rows), []).append(rows)
    resampled = [_statistics(values, others, np.stack(rows)) for rows in drawn.values()]
    kendall, spearman, partial, held_out = _statistics(values, others, np.arange(len(values))[None])[:, 0]
    ends = [_ends(each) for each in np.concatenate([np.empty((4, 0)), *resampled], axis=1)]
    return Predictor(
        measure=name, n=len(values), groups=len(members),
        kendall=float(kendall), kendall_low=ends[0][0], kendall_high=ends[0][1],
        spearman=float(spearman), spearman_low=ends[1][0], spearman_high=ends[1][1],
        partial=float(partial), partial_low=ends[2][0], partial_high=ends[2][1],
        held_out=float(held_out), held_out_low=ends[3][0], held_out_high=ends[3][1],
    )  # fmt: skip


def _ends(drawn: Array) -> tuple[float, float]:
    """Return the 95 % interval; NaN if more than half of the resamples have no correlation."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < RESAMPLES // 2:
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _statistics(values: Array, others: Array, rows: Rows) -> Array:
    """Return τ, ρ, partial ρ with the gap, and ρ with the held-out loss (4 × R); NaN for equal values."""
    gap, train, held_out = others
    x, y, z, h = (rankdata(each[rows], axis=1) for each in (values, gap, train, held_out))
    xy, xz, yz = _pearson(x, y), _pearson(x, z), _pearson(y, z)
    rest = (1 - xz**2) * (1 - yz**2)
    partial = np.where(rest > 1e-12, (xy - xz * yz) / np.sqrt(np.maximum(rest, 1e-12)), np.nan)
    return np.stack([_kendall(values, gap, rows), xy, partial, _pearson(x, h)])


def _pearson(x: Array, y: Array) -> Array:
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1)))


def _kendall(x: Array, y: Array, rows: Rows) -> Array:
    """Return τ_b: concordant minus discordant pairs, over the geometric mean of the untied pairs."""
    signs = [np.sign(each[:, None] - each[None]).astype(np.int8) for each in (x, y)]
    found = []
    for part in np.array_split(rows, max(1, rows.size * rows.shape[1] // AT_ONCE)):
        one, other = (each[part[:, :, None], part[:, None]] for each in signs)
        agree, *untied = (
            pairs.sum((1, 2), dtype=np.int64) for pairs in (one * other, np.abs(one), np.abs(other))
        )
        with np.errstate(invalid="ignore"):
            found.append(agree / np.sqrt(untied[0] * untied[1].astype(float)))
    return np.concatenate(found)

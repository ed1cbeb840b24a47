"""Does a measure predict the generalisation gap? Rank correlations over a sweep's runs, with intervals.

Kendall's τ_b and Spearman's ρ. Intervals are percentile bootstraps that draw whole groups of runs (the
seeds of one setting are no independent evidence), as Davison & Hinkley 1997, sec. 3.8. An interval that
holds 0 says that the measure was not seen to predict anything. Of many measures some interval misses 0 by
chance: the count of measures belongs beside the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from rayft.analysis.record import Predictor
from rayft.errors import ReportError
from rayft.numerics import derive_seed

__all__ = ["LEAST", "Run", "correlations"]

LEAST = 3
"""Runs below which no correlation is given."""
LEAST_GROUPS = 6
"""Settings below which no interval is given: three runs in perfect order are chance one time in three, and
resampling them shows perfect order again."""
RESAMPLES = 2000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """A run's measures and its gap."""

    group: str
    """What it shares with runs that differ in their seed alone."""
    gap: float
    measures: Mapping[str, float]


def correlations(runs: Sequence[Run], seed: int = 0) -> list[Predictor]:
    """Correlate every measure with the gap, over the runs that have both as finite numbers.

    A measure that is the same in all runs, or that fewer than three runs have, is left out.

    Returns:
        The strongest |ρ| first.

    Raises:
        ReportError: if there are fewer than three runs.
    """
    if len(runs) < LEAST:
        raise ReportError(
            f"a correlation needs {LEAST} finished runs with a gap or more, here are {len(runs)}; train more "
            "of them, or more seeds"
        )
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.measures):
        mine = [run for run in runs if math.isfinite(run.measures.get(name, math.nan))]
        values = np.array([run.measures[name] for run in mine])
        gaps = np.array([run.gap for run in mine])
        if len(mine) >= LEAST and np.ptp(values) > 0 and np.ptp(gaps) > 0:
            found.append(_correlate(name, values, gaps, [run.group for run in mine], seed))
    return sorted(found, key=lambda one: -abs(one.spearman))


def _correlate(name: str, values: Array, gaps: Array, groups: Sequence[str], seed: int) -> Predictor:
    members = [np.flatnonzero(np.array(groups) == group) for group in dict.fromkeys(groups)]
    rng = np.random.default_rng(derive_seed("correlate", name, seed))
    drawn = []
    for _ in range(RESAMPLES if len(members) >= LEAST_GROUPS else 0):
        rows = np.concatenate([members[one] for one in rng.integers(0, len(members), len(members))])
        # Drawn runs that are all alike have no order.
        if np.ptp(values[rows]) > 0 and np.ptp(gaps[rows]) > 0:
            drawn.append(_both(values[rows], gaps[rows]))
    kendall, spearman = _both(values, gaps)
    ends = np.full((2, 2), np.nan)
    if len(drawn) >= RESAMPLES // 2:
        ends = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    return Predictor(
        measure=name, n=len(values), groups=len(members),
        kendall=kendall, kendall_low=float(ends[0, 0]), kendall_high=float(ends[1, 0]),
        spearman=spearman, spearman_low=float(ends[0, 1]), spearman_high=float(ends[1, 1]),
    )  # fmt: skip


def _both(values: Array, gaps: Array) -> tuple[float, float]:
    return float(kendalltau(values, gaps).statistic), float(spearmanr(values, gaps).statistic)

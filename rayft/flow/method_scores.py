"""Methods beside each other: each at the settings that the validation part chose, over its seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rayft.evaluate.compare import over_seeds
from rayft.flow.scoring import Measured
from rayft.flow.sweep.preflight import Plan
from rayft.report.record import MethodScore, Score
from rayft.sweep.tuner import Trial

__all__ = ["method_scores"]

REFERENCE = "lora"
"""What the others are compared with, where it was tried."""


def method_scores(
    plan: Plan, trials: Sequence[Trial], scores: Mapping[str, Measured]
) -> tuple[MethodScore, ...]:
    """Compare methods, the best on the validation part first; none where fewer than two have finished.

    The settings of a method are those whose finished seeds have the best mean on the validation part, by the
    sweep's own rule; settings of which fewer seeds have finished than of others are not chosen. Test scores
    and differences are means over seeds and questions with an interval for another draw of both
    (`rayft.evaluate.compare.over_seeds`).
    """
    grouped = _grouped(trials, scores)
    chosen = {name: _best(plan, groups, scores) for name, groups in grouped.items()}
    if len(chosen) < 2:
        return ()
    ordered = sorted(chosen, key=lambda name: _selection(plan, chosen[name], scores))
    reference = REFERENCE if REFERENCE in chosen else ordered[0]
    return tuple(
        MethodScore(
            method=name,
            settings=_without_seed(chosen[name][0]),
            tried=len(grouped[name]),
            trials=tuple(trial.point.name for trial in chosen[name]),
            val_loss=float(np.mean([_loss(trial) for trial in chosen[name]])),
            test=_over_seeds(_matrix(chosen[name], scores)),
            against=None if name == reference else reference,
            difference=None
            if name == reference
            else _over_seeds(_matrix(chosen[name], scores), _matrix(chosen[reference], scores)),
        )
        for name in ordered
    )


def _grouped(trials: Sequence[Trial], scores: Mapping[str, Measured]) -> dict[str, list[list[Trial]]]:
    """Gather finished, scored trials: method → those that differ in their seed alone."""
    found: dict[str, dict[str, list[Trial]]] = {}
    for trial in trials:
        if trial.status == "finished" and "test" in scores.get(trial.point.name, Measured()).parts:
            run = trial.point.run
            found.setdefault(run.method.name, {}).setdefault(run.setting, []).append(trial)
    return {name: [*groups.values()] for name, groups in found.items()}


def _best(plan: Plan, groups: Sequence[list[Trial]], scores: Mapping[str, Measured]) -> list[Trial]:
    most = max(map(len, groups))
    return min(
        (group for group in groups if len(group) == most),
        key=lambda group: _selection(plan, group, scores),
    )


def _selection(plan: Plan, group: Sequence[Trial], scores: Mapping[str, Measured]) -> tuple[float, float]:
    """Give what is least for the best: the mean validation loss, or score and then loss."""
    loss = float(np.nan_to_num(np.mean([_loss(trial) for trial in group]), nan=np.inf))
    if plan.config.sweep.select_by == "val_loss":
        return loss, 0.0
    return -float(np.mean([scores[trial.point.name].mean("val") or 0.0 for trial in group])), loss


def _loss(trial: Trial) -> float:
    assert trial.result is not None
    return float(trial.result["val_loss"])


def _matrix(group: Sequence[Trial], scores: Mapping[str, Measured]) -> NDArray[np.float64]:
    """Give the test scores (seeds × questions)."""
    return np.array([scores[trial.point.name].parts["test"] for trial in group], np.float64)


def _over_seeds(one: NDArray[np.float64], other: NDArray[np.float64] | None = None) -> Score:
    found = over_seeds([one], None if other is None else [other])
    return Score(value=found.value, low=found.ci_low, high=found.ci_high, n=one.shape[1])


def _without_seed(trial: Trial) -> str:
    return re.sub(rf"-s{trial.point.run.seed}$", "", trial.point.name)

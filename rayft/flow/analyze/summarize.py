"""Summarize an analysis: correlate each measure with the gap, and compare what the adapters write to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from rayft.analysis.predict import LEAST, Run, correlations
from rayft.analysis.record import AdapterAnalysis, Predictor, SweepAnalysis
from rayft.analysis.section import AnalyzeConfig
from rayft.analysis.spectral import principal_angles
from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, ReportError
from rayft.flow.analyze.source import Item
from rayft.methods.base import LoraFactors
from rayft.models.methods import method
from rayft.report.record import SweepRecord

__all__ = ["known", "summarize"]

ANGLES_OF, ANGLE_MODULES, ANGLE_TOP = 4, 12, 8
"""Principal angles: how many adapters (of different settings) are compared in pairs, in how many modules, and
how many directions of each module."""


def summarize(
    items: Sequence[Item],
    found: Sequence[AdapterAnalysis],
    config: AnalyzeConfig,
    losses: Mapping[str, float],
    chosen: Collection[str] = (),
) -> SweepAnalysis:
    """Correlate all measures with the gap, and compare the adapters with each other.

    Args:
        items: what was analysed.
        found: what was found, in the same order.
        config: what was asked for.
        losses: name → validation loss, which becomes one of the measures.
        chosen: names of the trials at each method's best settings. Their measures are correlated a second
            time, without those of the other trials.
    """
    known = [
        one.model_copy(update={"measures": {**one.measures, **_own(losses.get(one.name))}}) for one in found
    ]
    runs = {
        one.name: Run(one.group, one.gap.value, _candidates(one.measures), one.gap.train, one.gap.held_out)
        for one in known
        if one.gap is not None
    }
    best = [run for name, run in runs.items() if name in chosen]
    note = ""
    predictors: list[Predictor] = []
    among_best: list[Predictor] = []
    if "gap" in config.parts:
        try:
            predictors = correlations([*runs.values()], config.seed)
            # If these are all the runs, a second table would repeat the first.
            among_best = correlations(best, config.seed) if LEAST <= len(best) < len(runs) else []
        except ReportError as error:
            note = str(error)
    else:
        note = "the gap was not measured (analyze.parts has no gap), so nothing is correlated with it"
    return SweepAnalysis(
        config=config, adapters=tuple(known), predictors=tuple(predictors), chosen=tuple(among_best),
        note=note, angles=_angles(items),
    )  # fmt: skip


def known(record: SweepRecord) -> tuple[dict[str, float], set[str]]:
    """Return what the record of a sweep adds to an analysis of its trials.

    Returns:
        Name of a trial → its validation loss; and the names of the trials at each method's best settings.
    """
    losses = {trial.id: trial.kept_val_loss for trial in record.trials if trial.kept_val_loss is not None}
    return losses, {name for one in record.methods for name in one.trials}


def _own(loss: float | None) -> dict[str, float]:
    return {} if loss is None else {"val_loss": loss}


def _candidates(measures: Mapping[str, float]) -> dict[str, float]:
    """Return the measures without those that the gap is computed from, since they correlate with it."""
    parts = ("gap", "gap_low", "gap_high", "sample_train_loss", "sample_test_loss")
    return {name: value for name, value in measures.items() if name not in parts and math.isfinite(value)}


def _angles(items: Sequence[Item]) -> dict[str, tuple[float, ...]]:
    """Return the principal angles between the output spaces of adapters with different settings.

    Returns:
        Names of two adapters → their angles, as medians over some modules.
    """
    loaded: dict[str, Mapping[str, LoraFactors]] = {}
    for item in {item.group: item for item in reversed(items)}.values():
        if len(loaded) < ANGLES_OF and method(item.run.method.name).exports_lora:
            # The notes of an adapter that can't be read report that.
            with contextlib.suppress(ArtifactError):
                loaded[item.name] = AdapterArtifact.load(item.folder).modules
    names, found = [*loaded], {}
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            common = [path for path in loaded[one] if path in loaded[other]]
            chosen = common[:: max(1, len(common) // ANGLE_MODULES)][:ANGLE_MODULES]
            angles = [
                principal_angles(loaded[one][path], loaded[other][path], "output", ANGLE_TOP).numpy()
                for path in chosen
            ]
            length = min((len(each) for each in angles), default=0)
            if length:
                median = np.median([each[:length] for each in angles], axis=0)
                found[f"{one} / {other}"] = tuple(map(float, median))
    return found

"""An analysis in words: the gaps and what predicts them, as sentences and as lines of tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayft.analysis.record import Predictor, SweepAnalysis
from rayft.report.text import human_count, loss_text, signed_text

__all__ = [
    "BoundRow",
    "GapRow",
    "PredictorRow",
    "bound_rows",
    "chosen_words",
    "gap_rows",
    "measure_name",
    "predictor_rows",
    "predictor_words",
]

NAMED = 4
"""Predictors that a sentence names."""
WORDS = {
    "parameters": "numbers stored",
    "bound_information_log10": "information bound (log10)",
    "bound_lipschitz_log10": "Lipschitz term (log10)",
    "bound_norm_log10": "norm bound of a layer (log10)",
    "update_norm": "‖ΔW‖ of all modules",
    "update_over_base": "‖ΔW‖ / ‖W0‖",
    "update_spectral_max": "largest ‖ΔW‖₂ of a module",
    "update_nuclear": "nuclear norm of all modules",
    "effective_rank_mean": "mean effective rank",
    "stable_rank_mean": "mean stable rank",
    "sam_sharpness": "sharpness by SAM's step",
    "asam_sharpness": "sharpness by the adaptive step",
    "hessian_trace": "trace of the Hessian",
    "line_rise": "mean rise of the loss along a line",
    "landscape_rise": "mean rise of the loss in a plane",
    "val_loss": "validation loss",
}


@dataclass(frozen=True)
class PredictorRow:
    """A line of the table of predictors, as text."""

    measure: str
    spearman: str
    kendall: str
    partial: str
    held_out: str
    n: int
    correlates: bool
    """Whether the intervals of ρ and τ with the gap both exclude 0."""
    beyond_training_loss: bool
    """Whether the interval at equal training loss excludes 0."""
    with_held_out_loss: bool
    """Whether the interval of ρ with the held-out loss excludes 0."""


@dataclass(frozen=True)
class GapRow:
    """A line of the table of gaps."""

    name: str
    train: str
    held_out: str
    gap: str
    sharpness: str
    norm: str
    effective_rank: str
    missing: Mapping[str, str]


@dataclass(frozen=True)
class BoundRow:
    """A line of the table of bounds; a bound that says nothing is marked as vacuous."""

    name: str
    numbers: str
    information: str
    norm: str
    lipschitz: str


def predictor_rows(predictors: Sequence[Predictor]) -> list[PredictorRow]:
    """Return the table's lines, in the order of the predictors."""
    found = []
    for one in predictors:
        ends = {
            name: (getattr(one, f"{name}_low"), getattr(one, f"{name}_high"))
            for name in ("spearman", "kendall", "partial", "held_out")
        }
        apart = {name: low > 0 or high < 0 for name, (low, high) in ends.items()}
        found.append(
            PredictorRow(
                measure=measure_name(one.measure), n=one.n,
                spearman=signed_text(one.spearman, *ends["spearman"]),
                kendall=signed_text(one.kendall, *ends["kendall"]),
                partial=signed_text(one.partial, *ends["partial"]),
                held_out=signed_text(one.held_out, *ends["held_out"]),
                correlates=apart["spearman"] and apart["kendall"],
                beyond_training_loss=apart["partial"],
                with_held_out_loss=apart["held_out"],
            )
        )  # fmt: skip
    return found


def predictor_words(analysis: SweepAnalysis) -> str:
    """Describe in a sentence or two whether there is a gap, and which measures predict it."""
    gaps = [one.gap for one in analysis.adapters if one.gap is not None]
    apart = sum(gap.low > 0 or gap.high < 0 for gap in gaps)
    if not analysis.predictors:
        note = analysis.note[:1].upper() + analysis.note[1:]
        return f"{note}." if note else "No measure varied between the runs, so none can predict the gap."
    found = _predicting(analysis.predictors)
    # One 95 % interval in twenty excludes 0 by chance.
    if apart <= round(0.05 * len(gaps)):
        which = f"Of {len(gaps)} gaps {apart or 'none'} can be told from 0"
        return f"{which}, so the correlations here are mostly with the choice of the examples. {found}"
    return found


def chosen_words(analysis: SweepAnalysis) -> str:
    """Describe which measures predict the gap over each method's best setting alone; empty if unknown."""
    if not analysis.chosen or all(math.isnan(one.spearman_low) for one in analysis.chosen):
        return ""
    return _predicting(analysis.chosen)


def _predicting(predictors: Sequence[Predictor]) -> str:
    rows = predictor_rows(predictors)
    most = max(predictors, key=lambda one: one.n)
    over = f"over {most.n} runs of {most.groups} settings"
    if all(math.isnan(one.spearman_low) for one in predictors):
        return (
            f"{over.capitalize()} no interval can be computed, which takes six settings: whether any measure "
            "predicts the gap is unknown."
        )
    correlated = [row.measure for row in rows if row.correlates]
    if not correlated:
        return f"{over.capitalize()} none of {len(rows)} measures was found to correlate with the gap."
    chance = f"of {len(rows)} measures about {max(1, round(0.05 * len(rows)))} would by chance"
    found = f"{over.capitalize()} these measures correlate with the gap: {_listed(correlated)} ({chance})"
    if all(math.isnan(one.held_out) for one in predictors):
        return f"{found}."
    more = _listed([row.measure for row in rows if row.beyond_training_loss])
    loss = _listed([row.measure for row in rows if row.with_held_out_loss])
    return f"{found}; at equal training loss: {more}; with the held-out loss itself: {loss}."


def _listed(names: Sequence[str]) -> str:
    """Join the first few names, which are the strongest."""
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more]) or "none"


def gap_rows(analysis: SweepAnalysis) -> list[GapRow]:
    """Return each adapter's losses and measures, the smallest gap first."""
    ordered = sorted(
        analysis.adapters,
        key=lambda one: one.gap.value if one.gap and math.isfinite(one.gap.value) else math.inf,
    )
    return [
        GapRow(
            name=one.name,
            train=loss_text(one.gap.train if one.gap else None),
            held_out=loss_text(one.gap.held_out if one.gap else None),
            gap=signed_text(one.gap.value, one.gap.low, one.gap.high, 3) if one.gap else "–",
            sharpness=_number(one.measures.get("sam_sharpness")),
            norm=_number(one.measures.get("update_norm")),
            effective_rank=_number(one.measures.get("effective_rank_mean")),
            missing=_by_reason(one.notes),
        )
        for one in ordered
    ]


def bound_rows(analysis: SweepAnalysis) -> list[BoundRow]:
    """Return the bounds of each adapter that has any, in nats, in the order of the adapters."""
    found = []
    for one in analysis.adapters:
        texts = {
            name: power_text(one.measures.get(f"{name}_log10")) + (" vacuous" if name in one.vacuous else "")
            for name in ("bound_information", "bound_norm", "bound_lipschitz")
        }
        if "bound_information_log10" in one.measures:
            numbers = human_count(one.measures.get("parameters"))
            found.append(BoundRow(one.name, numbers, *texts.values()))
    return found


def power_text(log10: float | None) -> str:
    """Format a number, which may be larger than any float, by its decimal logarithm."""
    if log10 is None or math.isnan(log10):
        return "–"
    if math.isinf(log10):
        return "0" if log10 < 0 else "infinite"
    if -4 <= log10 < 5:
        return f"{10**log10:.3g}" if log10 < 3 else f"{10**log10:.0f}"
    whole = math.floor(log10)
    return f"{10 ** (log10 - whole):.2f}e{whole:+d}"


def _by_reason(notes: Mapping[str, str]) -> dict[str, str]:
    """Group parts that are missing for the same reason: `spectra, landscape` → why."""
    parts: dict[str, list[str]] = {}
    for part, why in notes.items():
        parts.setdefault(why, []).append(part)
    return {", ".join(names): why for why, names in parts.items()}


def measure_name(measure: str) -> str:
    """Return the name of a measure on the page and in the terminal."""
    if measure.startswith("intruders_below_"):
        return f"intruders at ε = {measure.rpartition('_')[2]}"
    if measure.startswith("intruder_share_below_"):
        return f"intruders of all vectors at ε = {measure.rpartition('_')[2]}"
    if measure.startswith("hessian_eigenvalue_"):
        return f"Hessian eigenvalue {measure.rpartition('_')[2]}"
    return WORDS.get(measure, measure.replace("_", " "))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if math.isfinite(value) else "not finite"

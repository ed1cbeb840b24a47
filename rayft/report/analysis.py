"""The analysis on the page: what predicts the gap, the gaps, spectra, intruders, landscapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from rayft.analysis.record import AdapterAnalysis, Predictor, SweepAnalysis
from rayft.report.canvas import INK, SOFT, STYLE, canvas, legend, styles, svg, tip
from rayft.report.drawing import Drawing
from rayft.report.landscape_figures import landscape_figures
from rayft.report.rows import loss_text, signed_text

__all__ = [
    "GapRow",
    "PredictorRow",
    "analysis_figures",
    "chosen_words",
    "gap_rows",
    "predictor_rows",
    "predictor_words",
]

MOST, TYPICAL = 7, 12
"""Adapters in one figure of curves, more colours can't be told apart; with one of each method, by markers."""
MARKERS = 32
"""Of a spectrum's curve, about: a whole model's update has hundreds of singular values."""
WIDE = 4
"""Ranks are drawn by logarithm where the longest spectrum is more than so many times the shortest."""
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
    tells: bool
    """Whether both intervals with the gap leave 0 out."""
    tells_more: bool
    """Whether that at equal training loss does."""
    tells_loss: bool
    """Whether that with the held-out loss does."""


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


def predictor_rows(predictors: Sequence[Predictor]) -> list[PredictorRow]:
    """Give their lines, in their order."""
    found = []
    for one in predictors:
        ends = {
            name: (getattr(one, f"{name}_low"), getattr(one, f"{name}_high"))
            for name in ("spearman", "kendall", "partial", "held_out")
        }
        tells = {name: low > 0 or high < 0 for name, (low, high) in ends.items()}
        found.append(
            PredictorRow(
                measure=_words(one.measure), n=one.n,
                spearman=signed_text(one.spearman, *ends["spearman"]),
                kendall=signed_text(one.kendall, *ends["kendall"]),
                partial=signed_text(one.partial, *ends["partial"]),
                held_out=signed_text(one.held_out, *ends["held_out"]),
                tells=tells["spearman"] and tells["kendall"],
                tells_more=tells["partial"],
                tells_loss=tells["held_out"],
            )
        )  # fmt: skip
    return found


def predictor_words(analysis: SweepAnalysis) -> str:
    """Say in a sentence or two whether there is a gap, and whether anything predicts it."""
    gaps = [one.gap for one in analysis.adapters if one.gap is not None]
    apart = sum(gap.low > 0 or gap.high < 0 for gap in gaps)
    if not analysis.predictors:
        return analysis.note or "No measure varied between the runs, so none could predict anything."
    found = _predicting(analysis.predictors)
    # So many leave 0 out by chance.
    if apart <= round(0.05 * len(gaps)):
        which = f"Of {len(gaps)} gaps {apart or 'none'} can be told from 0"
        return f"{which}: what correlates here correlates mostly with the drawing of the examples. {found}"
    return found


def chosen_words(analysis: SweepAnalysis) -> str:
    """Say what is left of it among each method's best setting; empty where nothing can be said."""
    if not analysis.chosen or all(math.isnan(one.spearman_low) for one in analysis.chosen):
        return ""
    return _predicting(analysis.chosen)


def _predicting(predictors: Sequence[Predictor]) -> str:
    rows = predictor_rows(predictors)
    most = max(predictors, key=lambda one: one.n)
    over = f"over {most.n} runs of {most.groups} settings"
    if all(math.isnan(one.spearman_low) for one in predictors):
        return (
            f"{over.capitalize()} no interval can be given, which takes six settings: nothing can be said to "
            "predict the gap."
        )
    telling = [row.measure for row in rows if row.tells]
    if not telling:
        return f"None of {len(rows)} measures was seen to predict the generalisation gap {over}."
    chance = f"of {len(rows)} measures about {max(1, round(0.05 * len(rows)))} would by chance"
    found = f"{over.capitalize()} these go with the gap: {_listed(telling)} ({chance})"
    if all(math.isnan(one.held_out) for one in predictors):
        return f"{found}."
    more = _listed([row.measure for row in rows if row.tells_more])
    loss = _listed([row.measure for row in rows if row.tells_loss])
    return f"{found}; at equal training loss: {more}; with the held-out loss itself: {loss}."


def _listed(names: Sequence[str]) -> str:
    """Name a few, the strongest."""
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more]) or "none"


def gap_rows(analysis: SweepAnalysis) -> list[GapRow]:
    """Give each adapter's losses and measures, the smallest gap first."""
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


def _by_reason(notes: Mapping[str, str]) -> dict[str, str]:
    """Put parts that are missing for one reason together: `spectra, landscape` → why."""
    parts: dict[str, list[str]] = {}
    for part, why in notes.items():
        parts.setdefault(why, []).append(part)
    return {", ".join(names): why for why, names in parts.items()}


def analysis_figures(analysis: SweepAnalysis, typical: Sequence[str] = ()) -> list[Drawing]:
    """Draw what there is data for.

    Args:
        analysis: what was found.
        typical: adapters that curves and planes are drawn of before others.
    """
    curves = _curves(analysis, typical)
    with mpl.rc_context(STYLE):
        drawn = [_gaps(analysis), _spectra(curves), _intruders(curves, top=True)]
        drawn += [_intruders(curves, top=False), _angles(analysis)]
        drawn += landscape_figures(curves)
    return [drawing for drawing in drawn if drawing is not None]


def _gaps(analysis: SweepAnalysis) -> Drawing | None:
    """Draw the best predictor against the gap."""
    if not analysis.predictors:
        return None
    best = analysis.predictors[0]
    shown = [
        one
        for one in analysis.adapters
        if one.gap and math.isfinite(one.measures.get(best.measure, math.nan))
    ]
    figure, axes = canvas(height=3.9)
    for one in shown:
        assert one.gap is not None
        x, y = one.measures[best.measure], one.gap.value
        axes.errorbar(
            x, y, [[max(y - one.gap.low, 0)], [max(one.gap.high - y, 0)]], color=INK, alpha=0.45, linewidth=1
        )
        (point,) = axes.plot(x, y, "o", color=INK, markersize=5)
        tip(point, f"{one.name}: gap {y:+.3f} at {x:.4g}")
    axes.axhline(0, color=SOFT, linewidth=1)
    axes.set_xlabel(_words(best.measure))
    axes.set_ylabel("gap: held-out less training loss")
    told = f"Spearman {signed_text(best.spearman, best.spearman_low, best.spearman_high)}"
    return Drawing(
        key="gaps",
        title="The strongest predictor",
        caption=(
            "The generalisation gap of every run, with its 95 % interval, against the measure that goes with "
            f"it most. {told}."
        ),
        alt=f"Gap against {_words(best.measure)} of {len(shown)} runs: {told}.",
        svg=svg(figure, "gaps"),
    )


def _curves(analysis: SweepAnalysis, typical: Sequence[str]) -> list[AdapterAnalysis]:
    """Choose what is drawn: the typical ones, then one of each other setting."""
    named = {one.name: one for one in analysis.adapters if one.spectra or one.landscapes}
    first = {one.group or one.name: one for one in (named[name] for name in typical if name in named)}
    shown = list(first.values())[:TYPICAL]
    for one in named.values():
        key = one.group or one.name
        if len(shown) < MOST and key not in first:
            first[key] = one
            shown.append(one)
    return shown


def _spectra(curves: Sequence[AdapterAnalysis]) -> Drawing | None:
    shown = [one for one in curves if one.median_spectrum]
    if not shown:
        return None
    figure, axes = canvas(height=3.9, names=len(shown))
    style = styles([one.name for one in shown])
    for one in shown:
        colour, marker = style[one.name]
        ranks = np.arange(1, len(one.median_spectrum) + 1)
        values = np.maximum(one.median_spectrum, 1e-6)
        last = len(ranks) - 1
        marks = [*ranks - 1] if last < MARKERS else [*{int(i) for i in np.geomspace(1, last, MARKERS)}, 0]
        (line,) = axes.plot(ranks, values, color=colour, marker=marker, markersize=3.5, markevery=marks)
        tip(line, one.name)
    axes.set_yscale("log")
    logarithmic: list[Axis] = [axes.yaxis]
    lengths = [len(one.median_spectrum) for one in shown]
    if max(lengths) > WIDE * min(lengths):
        axes.set_xscale("log")
        logarithmic.append(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in logarithmic:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("index")
    axes.set_ylabel("singular value / largest")
    legend(figure, style, [], lines=True)
    told = "; ".join(f"{one.name} falls to {one.median_spectrum[-1]:.2g}" for one in shown)
    return Drawing(
        key="spectra",
        title="Spectra of the updates",
        caption=(
            "Singular values of ΔW over the largest, the median over modules; one run of each setting. A "
            "flat curve can't be squeezed."
        ),
        alt=f"Median singular values relative to the largest: {told}.",
        svg=svg(figure, "spectra"),
    )


def _intruders(curves: Sequence[AdapterAnalysis], *, top: bool) -> Drawing | None:
    """Draw the intruders among the leading singular vectors, or the share of all of them."""
    found = {
        one.name: (one.intruders, one.intruders.counts if top else one.intruders.shares)
        for one in curves
        if one.intruders and (top or one.intruders.shares)
    }
    if not found:
        return None
    figure, axes = canvas(height=3.9, names=len(found))
    style = styles([*found])
    for name, (one, values) in found.items():
        colour, marker = style[name]
        (line,) = axes.plot(one.epsilons, values, color=colour, marker=marker, markersize=4)
        tip(line, name)
    first, _ = next(iter(found.values()))
    extra = []
    if top:
        axes.plot(first.epsilons, first.baseline, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.4)
        extra = [Line2D([], [], color=SOFT, linestyle=(0, (4, 3)), linewidth=1.4, label="random vectors")]
    axes.set_xlabel("ε")
    axes.set_ylabel(f"intruders among the top {first.top}" if top else "share of all vectors")
    legend(figure, style, extra, lines=True)
    # Most turns up late among all vectors: those of small singular values turn first.
    at = len(first.epsilons) // 2 if top else -1
    told = "; ".join(f"{name} {values[at]:.{1 if top else 3}f}" for name, (_, values) in found.items())
    which = f"Of the {first.top} leading singular vectors" if top else "Of all singular vectors"
    counted = "how many there are" if top else "the share"
    random = " The dashed line is what random vectors would give." if top else ""
    key = "intruders" if top else "intruders-all"
    return Drawing(
        key=key,
        title="Intruder dimensions" if top else "Intruders among all vectors",
        caption=(
            f"{which} of W0 + ΔW, {counted} that have no |cos| above ε to any of W0's, mean over "
            f"{len(first.modules)} modules.{random}"
        ),
        alt=f"Intruder dimensions at ε = {first.epsilons[at]:g}: {told}.",
        svg=svg(figure, key),
    )


def _angles(analysis: SweepAnalysis) -> Drawing | None:
    if not analysis.angles:
        return None
    pairs = list(analysis.angles.items())[:MOST]
    numbers = {
        one: str(i) for i, one in enumerate(dict.fromkeys(" / ".join(analysis.angles).split(" / ")), 1)
    }
    figure, axes = canvas(height=3.9)
    labels = {name: " and ".join(numbers[one] for one in name.split(" / ")) for name, _ in pairs}
    style = styles([*labels.values()])
    for name, angles in pairs:
        colour, marker = style[labels[name]]
        degrees = np.degrees(angles)
        (line,) = axes.plot(range(1, len(angles) + 1), degrees, color=colour, marker=marker, markersize=4)
        tip(line, name)
    axes.set_ylim(0, 93)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("index")
    axes.set_ylabel("principal angle, degrees")
    legend(figure, style, [], lines=True)
    told = "; ".join(f"{name} {math.degrees(angles[0]):.0f}°" for name, angles in pairs)
    return Drawing(
        key="angles",
        title="Angles between adapters",
        caption=(
            "Principal angles between what two updates write to (their leading singular directions), median "
            "over modules; 90° is nothing in common. "
            + ", ".join(f"{number} is {one}" for one, number in numbers.items())
            + "."
        ),
        alt=f"Smallest principal angles: {told}.",
        svg=svg(figure, "angles"),
    )


def _words(measure: str) -> str:
    if measure.startswith("intruders_below_"):
        return f"intruders at ε = {measure.rpartition('_')[2]}"
    if measure.startswith("intruder_share_below_"):
        return f"intruders of all vectors at ε = {measure.rpartition('_')[2]}"
    if measure.startswith("hessian_eigenvalue_"):
        return f"Hessian eigenvalue {measure.rpartition('_')[2]}"
    return WORDS.get(measure, measure.replace("_", " "))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"

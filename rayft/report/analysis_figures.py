"""The figures of an analysis: the strongest predictor, spectra, intruders, angles and landscapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from rayft.analysis.record import AdapterAnalysis, SweepAnalysis
from rayft.report.analysis import measure_name
from rayft.report.landscape import landscape_figures
from rayft.report.style import INK, SOFT, STYLE, Drawing, legend, new_figure, styles, svg, tip
from rayft.report.text import signed_text

__all__ = ["analysis_figures"]

MOST, TYPICAL = 7, 12
"""Most adapters in one figure of curves: any, told apart by colour; each method's best, by marker too."""
MARKERS = 32
"""About how many markers a spectrum has: a whole model's update has hundreds of singular values."""
WIDE = 4
"""Ranks have a logarithmic axis where the longest spectrum is more than so many times the shortest."""


@mpl.rc_context(STYLE)
def analysis_figures(analysis: SweepAnalysis, typical: Sequence[str] = ()) -> list[Drawing]:
    """Draw every figure that the analysis has data for.

    Args:
        analysis: what was found.
        typical: names of adapters whose curves and planes are drawn before those of others.
    """
    curves = _curves(analysis, typical)
    drawn = [_gaps(analysis), _spectra(curves), _intruders(curves, top=True), _intruders(curves, top=False)]
    drawn += [_angles(analysis), *landscape_figures(curves)]
    return [drawing for drawing in drawn if drawing is not None]


def _gaps(analysis: SweepAnalysis) -> Drawing | None:
    """Draw the gap against the measure that goes with it most."""
    if not analysis.predictors:
        return None
    best = analysis.predictors[0]
    shown = [
        one
        for one in analysis.adapters
        if one.gap and math.isfinite(one.measures.get(best.measure, math.nan))
    ]
    figure = new_figure(3.9)
    axes = figure.add_subplot()
    for one in shown:
        assert one.gap is not None
        x, y = one.measures[best.measure], one.gap.value
        axes.errorbar(
            x, y, [[max(y - one.gap.low, 0)], [max(one.gap.high - y, 0)]], color=INK, alpha=0.45, linewidth=1
        )
        (point,) = axes.plot(x, y, "o", color=INK, markersize=5)
        tip(point, f"{one.name}: gap {y:+.3f} at {x:.4g}")
    axes.axhline(0, color=SOFT, linewidth=1)
    axes.set_xlabel(measure_name(best.measure))
    axes.set_ylabel("gap: held-out minus training loss")
    words = f"Spearman {signed_text(best.spearman, best.spearman_low, best.spearman_high)}"
    known = math.isfinite(best.spearman_low)
    among = "" if known else f", of those that {best.n} runs have"
    return Drawing(
        key="gaps",
        title="The strongest predictor" if known else "The strongest correlation",
        caption=(
            "The generalisation gap of every run, with its 95 % interval, against the measure that "
            f"correlates most with it{among}. {words}."
        ),
        alt=f"Gap against {measure_name(best.measure)} of {len(shown)} runs: {words}.",
        svg=svg(figure, "gaps"),
    )


def _curves(analysis: SweepAnalysis, typical: Sequence[str]) -> list[AdapterAnalysis]:
    """Choose the adapters whose curves are drawn: the typical ones, then one of each other setting."""
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
    figure = new_figure(3.9, names=len(shown))
    axes = figure.add_subplot()
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
    legend(figure, style, lines=True)
    words = "; ".join(f"{one.name} falls to {one.median_spectrum[-1]:.2g}" for one in shown)
    return Drawing(
        key="spectra",
        title="Spectra of the updates",
        caption=(
            "Singular values of ΔW divided by the largest, the median over modules; one run of each setting. "
            "An update with a flat curve can't be squeezed."
        ),
        alt=f"Median singular values relative to the largest: {words}.",
        svg=svg(figure, "spectra"),
    )


def _intruders(curves: Sequence[AdapterAnalysis], *, top: bool) -> Drawing | None:
    """Draw the number of intruders among the leading singular vectors, or their share of all vectors."""
    found = {
        one.name: (one.intruders, one.intruders.counts if top else one.intruders.shares)
        for one in curves
        if one.intruders and (top or one.intruders.shares)
    }
    if not found:
        return None
    figure = new_figure(3.9, names=len(found))
    axes = figure.add_subplot()
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
    # Among all vectors the adapters differ at a large ε only: vectors of small singular values turn first.
    at = len(first.epsilons) // 2 if top else -1
    words = "; ".join(f"{name} {values[at]:.{1 if top else 3}f}" for name, (_, values) in found.items())
    which = f"Of the {first.top} leading singular vectors" if top else "Of all singular vectors"
    counted = "the number" if top else "the share"
    random = " The dashed line is the number for random vectors." if top else ""
    key = "intruders" if top else "intruders-all"
    return Drawing(
        key=key,
        title="Intruder dimensions" if top else "Intruders among all vectors",
        caption=(
            f"{which} of W0 + ΔW, {counted} whose |cos| to every singular vector of W0 is below ε, mean over "
            f"{len(first.modules)} modules.{random}"
        ),
        alt=f"Intruder dimensions at ε = {first.epsilons[at]:g}: {words}.",
        svg=svg(figure, key),
    )


def _angles(analysis: SweepAnalysis) -> Drawing | None:
    if not analysis.angles:
        return None
    pairs = list(analysis.angles.items())[:MOST]
    numbers = {
        one: str(i) for i, one in enumerate(dict.fromkeys(" / ".join(analysis.angles).split(" / ")), 1)
    }
    figure = new_figure(3.9)
    axes = figure.add_subplot()
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
    legend(figure, style, lines=True)
    words = "; ".join(f"{name} {math.degrees(angles[0]):.0f}°" for name, angles in pairs)
    return Drawing(
        key="angles",
        title="Angles between adapters",
        caption=(
            "Principal angles between the outputs of two updates (their leading left singular vectors), "
            "median over modules; at 90° they have nothing in common. "
            + ", ".join(f"{number} is {one}" for one, number in numbers.items())
            + "."
        ),
        alt=f"Smallest principal angles: {words}.",
        svg=svg(figure, "angles"),
    )

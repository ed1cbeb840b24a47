"""The report's figures. Methods differ by colour and by marker; every figure is told in words too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from rayft.report.canvas import INK, SERIES, STYLE, canvas, legend, short, styles, svg, tip
from rayft.report.drawing import Drawing, baselines, methods, score_axis
from rayft.report.fronts import draw_fronts
from rayft.report.labels import place
from rayft.report.record import SweepRecord, Trial

__all__ = ["draw_all"]


_HOWS = {"post": "no further training", "cont": "some steps after", "in": "squeezed during training"}


def draw_all(record: SweepRecord) -> list[Drawing]:
    """Draw every figure that the record has data for."""
    with mpl.rc_context(STYLE):
        drawn = [*draw_fronts(record), _learning(record), _energy(record), _squeeze(record)]
    return [drawing for drawing in drawn if drawing is not None]


def _learning(record: SweepRecord) -> Drawing | None:
    trials = [trial for trial in record.trials if trial.val_loss]
    finite = [value for trial in trials for _, value in trial.val_loss if math.isfinite(value)]
    if not finite:
        return None
    figure, axes = canvas(height=4.2)
    style = methods(record, {trial.method for trial in trials})
    winner = record.winner.trial if record.winner else ""
    clipped = _loss_axis(axes, finite, _final_losses(trials))
    for trial in trials:
        _curve(axes, trial, *style[trial.method], own=trial.id == winner)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss")
    extra = [Line2D([], [], color=INK, marker="x", markeredgewidth=2, linestyle="none", label="ended early")]
    early = any(trial.status != "finished" for trial in trials)
    if winner:
        extra.append(Line2D([], [], color=INK, linewidth=3, label="winner"))
    legend(figure, style, extra if early else extra[1:], lines=True)
    figure.canvas.draw()
    _name_curves(axes, trials, winner)
    told = "; ".join(_curve_text(trial) for trial in trials)
    above = " What lies above the upper edge is drawn on it or beyond." if clipped else ""
    return Drawing(
        key="learning",
        title="Learning curves",
        caption=(
            "Validation loss of every trial. A cross marks where a trial was stopped by the scheduler, "
            "or failed." + above
        ),
        alt=f"Validation loss over steps: {told}.",
        svg=svg(figure, "learning"),
    )


def _loss_axis(axes: Axes, losses: Sequence[float], ends: float) -> bool:
    """Set the range so that a diverged trial doesn't press all others flat; True if it leaves any out."""
    low, high = min(losses), float(np.quantile(losses, 0.95))
    if max(losses) - low <= 2.5 * (high - low):
        high = max(losses)
    room = max(high - low, 1e-3) * 0.06
    top = max(high, ends) + room
    # Names stand below the lowest curve.
    axes.set_ylim(low - 2.5 * room, top)
    return max(losses) > top


def _name_curves(axes: Axes, trials: Sequence[Trial], winner: str) -> None:
    """Write names at the curves' ends, where there is room; the winner's first."""
    curves = [[(float(s), v) for s, v in trial.val_loss if math.isfinite(v)] for trial in trials]
    top = axes.get_ylim()[1]
    ends = [
        (curve[-1][0], min(curve[-1][1], top), trial.id)
        for trial, curve in zip(trials, curves, strict=True)
        if curve
    ]
    place(axes, sorted(ends, key=lambda end: end[2] != winner), curves, must=False)


def _curve(axes: Axes, trial: Trial, colour: str, marker: str, *, own: bool) -> None:
    steps, losses = zip(*trial.val_loss, strict=True)
    width, front = (3.0, 4) if own else (1.3, 2)
    (line,) = axes.plot(
        steps, losses, color=colour, marker=marker, markersize=3.5, linewidth=width, zorder=front
    )
    tip(line, _curve_text(trial))
    if trial.status != "finished":
        step, loss = _last_finite(trial)
        seen = min(loss, axes.get_ylim()[1])
        axes.plot(step, seen, "x", color=colour, markersize=9, markeredgewidth=2.2, zorder=5, clip_on=False)


def _energy(record: SweepRecord) -> Drawing | None:
    spectra = {name: values for name, values in record.singular_values.items() if _usable(values)}
    if not spectra or record.winner is None:
        return None
    rank = max(len(values) for values in spectra.values())
    curves = np.ones((len(spectra), rank + 1))
    for row, values in enumerate(spectra.values()):
        energy = np.cumsum(np.square(np.asarray(values, dtype=float)))
        curves[row, : len(values) + 1] = np.concatenate([[0.0], energy / energy[-1]])
    low, middle, high = np.quantile(curves, [0.1, 0.5, 0.9], axis=0)
    figure, axes = canvas(height=3.9)
    ranks = np.arange(rank + 1)
    colour = SERIES[0]
    axes.fill_between(ranks, curves.min(0), curves.max(0), color=colour, alpha=0.13, linewidth=0)
    axes.fill_between(ranks, low, high, color=colour, alpha=0.28, linewidth=0)
    axes.plot(ranks, middle, color=colour, linewidth=2.4)
    winner = record.winner.trial
    marks = sorted({min(item.rank, rank) for item in record.squeezed if item.trial == winner})
    for mark in marks:
        axes.axvline(mark, color=SERIES[1], linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(mark, middle[mark], "s", color=SERIES[1], markersize=6)
    axes.set_ylim(0, 1.04)
    axes.set_xlim(0, rank + 0.3)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rank kept")
    axes.set_ylabel("energy kept")
    handles = [Line2D([], [], color=colour, linewidth=2.4, label="median module")]
    handles.append(Line2D([], [], color=colour, linewidth=8, alpha=0.4, label="10–90 % (pale: all)"))
    if marks:
        handles.append(
            Line2D(
                [], [], color=SERIES[1], marker="s", linestyle=(0, (4, 3)), linewidth=1, label="squeezed to"
            )
        )
    legend(figure, {}, handles)
    told = ", ".join(f"{100 * middle[mark]:.1f} % at rank {mark}" for mark in (marks or [rank // 2]))
    return Drawing(
        key="energy",
        title=f"Singular values of {record.winner.trial}",
        caption=(
            f"Share of the squared singular values that the largest of them hold, over {len(spectra)} "
            "modules: the steeper, the more can be squeezed away."
        ),
        alt=f"Energy kept by rank, median over {len(spectra)} modules: {told}.",
        svg=svg(figure, "energy"),
    )


def _usable(values: Sequence[float]) -> bool:
    return any(values) and all(math.isfinite(value) for value in values)


def _squeeze(record: SweepRecord) -> Drawing | None:
    winner = record.winner.trial if record.winner else ""
    mine = [item for item in record.squeezed if item.test and item.trial == winner]
    scored = sorted(mine, key=lambda item: item.rank)
    if not scored:
        return None
    figure, axes = canvas(height=3.9)
    hows = list(dict.fromkeys(item.how for item in scored))
    style = styles(hows)
    for how in hows:
        points = [(item.rank, item.test) for item in scored if item.how == how and item.test]
        _with_intervals(axes, points, *style[how])
    source = next((trial for trial in record.trials if trial.id == scored[0].trial and trial.test), None)
    extra = []
    if source and source.test and source.rank:
        _with_intervals(axes, [(source.rank, source.test)], INK, "D")
        extra = [
            Line2D([], [], color=INK, marker="D", linestyle="none", label=f"{short(source.id)} as trained")
        ]
    ranks = sorted({item.rank for item in scored} | ({source.rank} if source and source.rank else set()))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    score_axis(axes, record, [item.test.high for item in scored if item.test])
    axes.set_xlabel("rank (log scale)")
    baselines(axes, record)
    legend(figure, style, extra, lines=True)
    told = "; ".join(f"rank {item.rank} ({item.how}) {item.test.value:.2f}" for item in scored if item.test)
    return Drawing(
        key="squeeze",
        title="Squeezing",
        caption=(
            "Test score with its 95 % interval after squeezing to a lower rank. "
            + "; ".join(f"{how}: {_HOWS.get(how, how)}" for how in hows)
            + "."
        ),
        alt=f"Test score by rank: {told}.",
        svg=svg(figure, "squeeze"),
    )


def _with_intervals(axes: Axes, points: Sequence[tuple[int, Any]], colour: str, marker: str) -> None:
    ranks = [rank for rank, _ in points]
    values = [score.value for _, score in points]
    below = [max(score.value - score.low, 0) for _, score in points]
    above = [max(score.high - score.value, 0) for _, score in points]
    axes.errorbar(
        ranks, values, [below, above], color=colour, marker=marker, markersize=6.5, capsize=3, elinewidth=1
    )


def _last_finite(trial: Trial) -> tuple[int, float]:
    points = [point for point in trial.val_loss if math.isfinite(point[1])]
    return points[-1] if points else (trial.val_loss[-1][0], math.nan)


def _final_losses(trials: Sequence[Trial]) -> float:
    """Give the highest loss that a finished trial ended with."""
    ends = [_last_finite(trial)[1] for trial in trials if trial.status == "finished"]
    return max((end for end in ends if math.isfinite(end)), default=-math.inf)


def _curve_text(trial: Trial) -> str:
    step, loss = _last_finite(trial)
    how = "" if trial.status == "finished" else f" ({trial.status})"
    return f"{trial.id} {loss:.2f} at step {step}{how}"

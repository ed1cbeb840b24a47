"""The figures of a sweep: score against cost, learning curves, the winner's spectrum, and squeezing.

A method has one colour and one marker in all figures, and each figure is described in words too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from rayft.report.labels import place
from rayft.report.record import SweepRecord, TrialRecord
from rayft.report.spectrum import energy_figure
from rayft.report.style import (
    INK,
    PAPER,
    SOFT,
    STYLE,
    Drawing,
    legend,
    new_figure,
    short,
    styles,
    svg,
    tip,
)
from rayft.report.table import TableRow, pareto, table_rows
from rayft.report.text import human_bytes, human_seconds, score_text

__all__ = ["sweep_figures"]

NAMED = 16
"""Most points of which the first figure names each; of more, it names those that there is room for."""
HOWS = {"post": "no further training", "cont": "some steps after", "in": "squeezed during training"}


@dataclass(frozen=True)
class _Cost:
    """A horizontal axis."""

    key: str
    title: str
    axis: str
    what: str
    """In a sentence: the … of the adapter."""
    of: Callable[[TableRow], float | None]
    text: Callable[[float | None], str]


COSTS = (
    _Cost(
        "scores", "Score against size", "adapter size", "bytes of the adapter", lambda row: row.bytes,
        human_bytes,
    ),
    _Cost(
        "time", "Score against training time", "training time", "seconds that its training took",
        # A squeezed adapter's seconds are those of the squeeze alone.
        lambda row: row.seconds if row.kind == "trial" else None, human_seconds,
    ),
    _Cost(
        "memory", "Score against peak memory", "peak memory of a worker", "most memory that a worker held",
        lambda row: row.memory, human_bytes,
    ),
)  # fmt: skip


@mpl.rc_context(STYLE)
def sweep_figures(record: SweepRecord) -> list[Drawing]:
    """Draw every figure that the record has data for."""
    drawn = [_front(record, cost) for cost in COSTS]
    drawn += [_learning(record), energy_figure(record), _squeeze(record)]
    return [drawing for drawing in drawn if drawing is not None]


def _methods(record: SweepRecord, shown: set[str]) -> dict[str, tuple[str, str]]:
    """Return the style of the methods that are shown, which is the same in every figure."""
    every = styles([trial.method for trial in record.trials])
    return {name: look for name, look in every.items() if name in shown}


def _score_axis(axes: Axes, record: SweepRecord, tops: Sequence[float]) -> list[float]:
    """Let scores begin at 0 and end above the highest, draw the baselines, and return their heights."""
    top = max([*tops, *(base.test.value for base in record.baselines)])
    axes.set_ylim(0, min(1.0, top * 1.12) * 1.01 if top > 0 else 1.0)
    axes.set_ylabel(f"test score ({record.metric})")
    return _baselines(axes, record)


def _baselines(axes: Axes, record: SweepRecord) -> list[float]:
    """Draw the best prompt and the majority answer as lines, named at the right end; return their heights."""
    majority = [base for base in record.baselines if "majority" in base.name]
    prompted = [base for base in record.baselines if "majority" not in base.name]
    best = [max(prompted, key=lambda base: base.test.value)] if prompted else []
    gap = 0.055 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    floor = -math.inf
    drawn = sorted([*best, *majority], key=lambda base: base.test.value)
    for base in drawn:
        axes.axhline(base.test.value, color=SOFT, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
        height = max(base.test.value, floor)
        floor = height + gap
        # A little above the line, so that the label's background leaves the line visible.
        axes.annotate(
            f"{short(base.name)} {base.test.value:.2f}", (1.0, height), (0, 2),
            xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            ha="right", va="bottom", fontsize=11, color=SOFT, zorder=2.5,
            bbox={"boxstyle": "square,pad=0", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
    return [base.test.value for base in drawn]


def _front(record: SweepRecord, cost: _Cost) -> Drawing | None:
    points = [row for row in table_rows(record) if row.kind != "baseline" and row.test and cost.of(row)]
    if not points or (cost.key != "scores" and len({cost.of(row) for row in points}) < 2):
        return None
    figure = new_figure(4.8)
    axes = figure.add_subplot()
    style = _methods(record, {row.method for row in points})
    _scatter(axes, points, style, cost)
    front = pareto(points, cost.of)
    line = [(cost.of(row) or 1.0, row.test.value) for row in front if row.test]
    axes.plot(*zip(*line, strict=True), color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log")
    _cost_axis(axes, [cost.of(row) or 1.0 for row in points], cost)
    heights = _score_axis(axes, record, [row.test.high for row in points if row.test])
    squeezed = any(row.kind == "squeezed" for row in points)
    extra = [Line2D([], [], color=INK, marker="o", linestyle="none", markerfacecolor=PAPER, label="squeezed")]
    extra += [Line2D([], [], color=SOFT, linewidth=1, linestyle=(0, (4, 3)), label="Pareto front")]
    legend(figure, style, extra if squeezed else extra[1:])
    figure.canvas.draw()
    # What matters most is named first, while there is room.
    order = sorted(points, key=lambda row: (not row.ship, not row.winner, row not in front))
    bars = [
        [(cost.of(row) or 1, row.test.low), (cost.of(row) or 1, row.test.high)] for row in points if row.test
    ]
    ends = axes.get_xlim()
    flat = [[(end, height) for end in ends] for height in heights]
    named = [(cost.of(row) or 1, row.test.value, _tag(record, row)) for row in order if row.test]
    place(axes, named, [line, *bars, *flat], must=cost.key == "scores" and len(named) <= NAMED)
    words = [f"{row.name} {row.test.value:.2f} at {cost.text(cost.of(row))}" for row in points if row.test]
    source = (
        f" A name that begins with @ is {record.winner.trial}, squeezed."
        if record.winner and squeezed
        else ""
    )
    return Drawing(
        key=cost.key,
        title=cost.title,
        caption=(
            f"Test score with its 95 % interval against the {cost.what}; up and to the left is better. "
            "No point beats those on the dashed front in both. The large point is what to ship." + source
        ),
        alt=(
            f"Test score by {cost.axis}: {'; '.join(words)}. "
            f"Pareto front: {', '.join(row.name for row in front)}."
        ),
        svg=svg(figure, cost.key),
    )


def _tag(record: SweepRecord, row: TableRow) -> str:
    """Shorten `t3@r4` to `@r4`, if t3 is the winner."""
    winner = record.winner.trial if record.winner else ""
    return row.name.removeprefix(winner) if row.name.startswith(f"{winner}@") else row.name


def _scatter(
    axes: Axes, points: Sequence[TableRow], style: Mapping[str, tuple[str, str]], cost: _Cost
) -> None:
    for row in points:
        x = cost.of(row)
        if row.test is None or x is None:
            continue
        colour, marker = style[row.method]
        below, above = max(row.test.value - row.test.low, 0), max(row.test.high - row.test.value, 0)
        axes.errorbar(x, row.test.value, [[below], [above]], color=colour, linewidth=1, alpha=0.55, zorder=2)
        (point,) = axes.plot(
            x, row.test.value, marker, color=colour, markersize=10 if row.ship else 6.5,
            markerfacecolor=colour if row.kind == "trial" else PAPER, markeredgewidth=1.6, zorder=3,
        )  # fmt: skip
        tip(point, f"{row.name}: {score_text(row.test)} at {cost.text(x)}")


def _cost_axis(axes: Axes, costs: Sequence[float], cost: _Cost) -> None:
    """Set the range of a logarithmic axis, and from two to five ticks that people count in."""
    low, high = min(costs) / 1.5, max(costs) * 1.9
    axes.set_xlim(low, high)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for factors in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        every = [factor * 10**power for power in exponents for factor in factors]
        ticks = [tick for tick in every if low <= tick <= high]
        if len(ticks) > 2:
            break
    while len(ticks) > 5:
        ticks = ticks[::2]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost.text(value)))
    axes.minorticks_off()
    axes.set_xlabel(f"{cost.axis} (log scale)")


def _learning(record: SweepRecord) -> Drawing | None:
    trials = [trial for trial in record.trials if trial.val_loss]
    finite = [value for trial in trials for _, value in trial.val_loss if math.isfinite(value)]
    if not finite:
        return None
    figure = new_figure(4.2)
    axes = figure.add_subplot()
    style = _methods(record, {trial.method for trial in trials})
    winner = record.winner.trial if record.winner else ""
    clipped = _loss_axis(axes, finite, _final_losses(trials))
    for trial in trials:
        _curve(axes, trial, *style[trial.method], wins=trial.id == winner)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss")
    extra = []
    if any(trial.kept_step is not None for trial in trials):
        extra.append(
            Line2D(
                [], [], color=INK, marker="o", markersize=8, fillstyle="none", linestyle="none", label="kept"
            )
        )
    if any(trial.status != "finished" for trial in trials):
        extra.append(
            Line2D([], [], color=INK, marker="x", markeredgewidth=2, linestyle="none", label="ended early")
        )
    if winner:
        extra.append(Line2D([], [], color=INK, linewidth=3, label="winner"))
    legend(figure, style, extra, lines=True)
    figure.canvas.draw()
    _name_curves(axes, trials, winner)
    words = "; ".join(_curve_text(trial) for trial in trials)
    above = " Losses above the upper edge are drawn on the edge or not at all." if clipped else ""
    return Drawing(
        key="learning",
        title="Learning curves",
        caption=(
            "Validation loss of every trial. A circle marks the evaluation whose weights were kept, where "
            "that is not the last one. A cross marks where the scheduler stopped a trial, or where it failed."
            + above
        ),
        alt=f"Validation loss over steps: {words}.",
        svg=svg(figure, "learning"),
    )


def _loss_axis(axes: Axes, losses: Sequence[float], ends: float) -> bool:
    """Set the range, and return whether it leaves losses out: a diverged trial would flatten the others."""
    low, high = min(losses), float(np.quantile(losses, 0.95))
    if max(losses) - low <= 2.5 * (high - low):
        high = max(losses)
    # Equal losses would be drawn with six digits and more.
    room = max((high - low) * 0.06, 0.005 * abs(high), 1e-4)
    top = max(high, ends) + room
    # Names stand below the lowest curve.
    axes.set_ylim(low - 2.5 * room, top)
    return max(losses) > top


def _final_losses(trials: Sequence[TrialRecord]) -> float:
    """Return the highest loss that a finished trial ended with."""
    ends = [_last_finite(trial)[1] for trial in trials if trial.status == "finished"]
    return max((end for end in ends if math.isfinite(end)), default=-math.inf)


def _last_finite(trial: TrialRecord) -> tuple[int, float]:
    points = [point for point in trial.val_loss if math.isfinite(point[1])]
    return points[-1] if points else (trial.val_loss[-1][0], math.nan)


def _curve(axes: Axes, trial: TrialRecord, colour: str, marker: str, *, wins: bool) -> None:
    steps, losses = zip(*trial.val_loss, strict=True)
    width, front = (3.0, 4) if wins else (1.3, 2)
    (line,) = axes.plot(
        steps, losses, color=colour, marker=marker, markersize=3.5, linewidth=width, zorder=front
    )
    tip(line, _curve_text(trial))
    if trial.kept_step is not None:
        kept = dict(trial.val_loss)[trial.kept_step]
        axes.plot(
            trial.kept_step,
            kept,
            "o",
            color=colour,
            markersize=11,
            markeredgewidth=2,
            fillstyle="none",
            zorder=5,
        )
    if trial.status != "finished":
        step, loss = _last_finite(trial)
        seen = min(loss, axes.get_ylim()[1])
        axes.plot(step, seen, "x", color=colour, markersize=9, markeredgewidth=2.2, zorder=5, clip_on=False)


def _name_curves(axes: Axes, trials: Sequence[TrialRecord], winner: str) -> None:
    """Write names at the curves' ends, where there is room; the winner's first."""
    curves = [[(float(s), v) for s, v in trial.val_loss if math.isfinite(v)] for trial in trials]
    top = axes.get_ylim()[1]
    ends = [
        (curve[-1][0], min(curve[-1][1], top), trial.id)
        for trial, curve in zip(trials, curves, strict=True)
        if curve
    ]
    place(axes, sorted(ends, key=lambda end: end[2] != winner), curves, must=False)


def _curve_text(trial: TrialRecord) -> str:
    step, loss = _last_finite(trial)
    how = "" if trial.status == "finished" else f" ({trial.status})"
    kept = "" if trial.kept_step is None else f", kept {trial.kept_val_loss:.2f} of step {trial.kept_step}"
    return f"{trial.id} {loss:.2f} at step {step}{how}{kept}"


def _squeeze(record: SweepRecord) -> Drawing | None:
    winner = record.winner.trial if record.winner else ""
    scored = sorted(
        (item for item in record.squeezed if item.test and item.trial == winner), key=lambda item: item.rank
    )
    if not scored:
        return None
    figure = new_figure(3.9)
    axes = figure.add_subplot()
    style = styles([item.how for item in scored])
    for how, look in style.items():
        points = [(item.rank, item.test) for item in scored if item.how == how and item.test]
        _with_intervals(axes, points, *look)
    source = next((trial for trial in record.trials if trial.id == winner and trial.test), None)
    extra, ranks = [], {item.rank for item in scored}
    if source and source.test and source.rank:
        _with_intervals(axes, [(source.rank, source.test)], INK, "D")
        ranks.add(source.rank)
        extra = [
            Line2D([], [], color=INK, marker="D", linestyle="none", label=f"{short(source.id)} as trained")
        ]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ranks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlabel("rank (log scale)")
    _score_axis(axes, record, [item.test.high for item in scored if item.test])
    legend(figure, style, extra, lines=True)
    words = "; ".join(f"rank {item.rank} ({item.how}) {item.test.value:.2f}" for item in scored if item.test)
    return Drawing(
        key="squeeze",
        title="Squeezing",
        caption=(
            "Test score with its 95 % interval after squeezing to a lower rank. "
            + "; ".join(f"{how}: {HOWS.get(how, how)}" for how in style)
            + "."
        ),
        alt=f"Test score by rank: {words}.",
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

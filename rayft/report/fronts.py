"""Score against what it costs: bytes, training time, peak memory, each with its Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from rayft.report.canvas import INK, PAPER, SOFT, canvas, legend, svg, tip
from rayft.report.drawing import Drawing, baselines, methods, score_axis
from rayft.report.labels import place
from rayft.report.record import SweepRecord
from rayft.report.rows import Row, human_bytes, human_seconds, pareto, rows
from rayft.report.verdict import score_text

__all__ = ["draw_fronts"]


@dataclass(frozen=True)
class _Cost:
    """What is on the horizontal axis."""

    key: str
    title: str
    axis: str
    what: str
    """In a sentence: the … of the adapter."""
    of: Callable[[Row], float | None]
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


def draw_fronts(record: SweepRecord) -> list[Drawing]:
    """Draw a figure for each cost that was measured."""
    drawn = [_front(record, cost) for cost in COSTS]
    return [drawing for drawing in drawn if drawing is not None]


def _front(record: SweepRecord, cost: _Cost) -> Drawing | None:
    points = [row for row in rows(record) if row.kind != "baseline" and row.test and cost.of(row)]
    if not points or (cost.key != "scores" and len({cost.of(row) for row in points}) < 2):
        return None
    figure, axes = canvas(height=4.8)
    style = methods(record, {row.method for row in points})
    _scatter(axes, points, style, cost)
    front = pareto(points, cost.of)
    line = [(cost.of(row) or 1.0, row.test.value) for row in front if row.test]
    axes.plot(*zip(*line, strict=True), color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log")
    _ticks(axes, [cost.of(row) or 1.0 for row in points], cost)
    score_axis(axes, record, [row.test.high for row in points if row.test])
    axes.set_xlabel(f"{cost.axis} (log scale)")
    baselines(axes, record)
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
    named = [(cost.of(row) or 1, row.test.value, _tag(record, row)) for row in order if row.test]
    # On the first figure every point has its name; the others name what there is room for.
    place(axes, named, [line, *bars], must=cost.key == "scores")
    told = [f"{row.name} {row.test.value:.2f} at {cost.text(cost.of(row))}" for row in points if row.test]
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
            "Nothing beats the points on the dashed front in both. The large point is what to ship." + source
        ),
        alt=(
            f"Test score by {cost.axis}: {'; '.join(told)}. "
            f"Pareto front: {', '.join(row.name for row in front)}."
        ),
        svg=svg(figure, cost.key),
    )


def _tag(record: SweepRecord, row: Row) -> str:
    """Shorten `t3@r4` to `@r4`, if t3 is the winner."""
    winner = record.winner.trial if record.winner else ""
    return row.name.removeprefix(winner) if row.name.startswith(f"{winner}@") else row.name


def _scatter(axes: Axes, points: Sequence[Row], style: Mapping[str, tuple[str, str]], cost: _Cost) -> None:
    for row in points:
        x = cost.of(row)
        if row.test is None or x is None:
            continue
        colour, marker = style[row.method]
        below, above = max(row.test.value - row.test.low, 0), max(row.test.high - row.test.value, 0)
        axes.errorbar(x, row.test.value, [[below], [above]], color=colour, linewidth=1, alpha=0.55, zorder=2)
        (point,) = axes.plot(
            x,
            row.test.value,
            marker,
            color=colour,
            markersize=10 if row.ship else 6.5,
            markerfacecolor=colour if row.kind == "trial" else PAPER,
            markeredgewidth=1.6,
            zorder=3,
        )
        tip(point, f"{row.name}: {score_text(row.test)} at {cost.text(x)}")


def _ticks(axes: Axes, sizes: Sequence[float], cost: _Cost) -> None:
    low, high = min(sizes) / 1.5, max(sizes) * 1.9
    axes.set_xlim(low, high)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [
        factor * 10**power for power in exponents for factor in (1, 2, 5) if low <= factor * 10**power <= high
    ]
    while len(ticks) > 5:
        ticks = ticks[::2]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost.text(value)))
    axes.minorticks_off()

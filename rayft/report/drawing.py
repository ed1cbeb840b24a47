"""What figures have in common: their place on the page, methods' colours, the axis of scores, baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from rayft.report.canvas import SOFT, short, styles
from rayft.report.record import SweepRecord

__all__ = ["Drawing", "baselines", "methods", "score_axis"]


@dataclass(frozen=True)
class Drawing:
    """One figure for the page."""

    key: str
    """Unique on the page; prefix of the SVG's ids."""
    title: str
    """Heading."""
    caption: str
    """What is drawn, and how to read it."""
    alt: str
    """The figure in words, for those who can't see it."""
    svg: str
    """An `<svg>` element."""


def methods(record: SweepRecord, shown: set[str]) -> dict[str, tuple[str, str]]:
    """Give the methods that are shown the colour and marker that they have in every figure."""
    every = styles([trial.method for trial in record.trials])
    return {name: look for name, look in every.items() if name in shown}


def score_axis(axes: Axes, record: SweepRecord, tops: Sequence[float]) -> None:
    """Let scores begin at 0 and end above the highest."""
    top = max([*tops, *(base.test.value for base in record.baselines)])
    axes.set_ylim(0, min(1.0, top * 1.12) * 1.01 if top > 0 else 1.0)
    axes.set_ylabel(f"test score ({record.metric})")


def baselines(axes: Axes, record: SweepRecord) -> None:
    """Draw the best prompt and the majority answer as lines, named at the right end."""
    majority = [base for base in record.baselines if "majority" in base.name]
    prompted = [base for base in record.baselines if "majority" not in base.name]
    best = [max(prompted, key=lambda base: base.test.value)] if prompted else []
    lines = sorted([*best, *majority], key=lambda base: base.test.value)
    gap = 0.055 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    floor = -math.inf
    for base in lines:
        axes.axhline(base.test.value, color=SOFT, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
        height = max(base.test.value, floor)
        floor = height + gap
        text = f"{short(base.name)} {base.test.value:.2f}"
        axes.text(
            1.0,
            height,
            text,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=11,
            color=SOFT,
        )

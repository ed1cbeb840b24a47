"""Loss landscapes on the page: lines in one figure, planes side by side at one scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from rayft.analysis.landscape import Landscape
from rayft.analysis.record import AdapterAnalysis
from rayft.report.canvas import SOFT, canvas, legend, short, styles, svg, tip
from rayft.report.drawing import Drawing
from rayft.report.landscape import COLOURS, grid_of, shared_limits

__all__ = ["landscape_figures"]

SHOWN, LEVELS = 12, 12
"""Planes side by side, and colours of them."""


def landscape_figures(adapters: Sequence[AdapterAnalysis]) -> list[Drawing]:
    """Draw the lines and planes that were measured of these adapters, each kind in one figure."""
    drawn = [_lines(adapters, kind) for kind in ("update", "line")]
    drawn += [_planes(adapters, kind) for kind in ("random", "trajectory")]
    return [drawing for drawing in drawn if drawing is not None]


def _found(
    adapters: Sequence[AdapterAnalysis], kind: str, most: int | None = None
) -> tuple[dict[str, Landscape], str]:
    """Give those that have something to draw, and a sentence that names the others."""
    measured = [one for one in adapters if kind in one.landscapes][:most]
    every = {one.name: Landscape.from_json(one.landscapes[kind]) for one in measured}
    drawn = {name: one for name, one in every.items() if one.finite}
    others = ", ".join(name for name in every if name not in drawn)
    return drawn, f" Nowhere finite: {others}." if others else ""


def _lines(adapters: Sequence[AdapterAnalysis], kind: str) -> Drawing | None:
    found, others = _found(adapters, kind)
    if not found:
        return None
    figure, axes = canvas(height=3.9, names=len(found))
    style = styles([*found])
    lowest = {}
    for name, one in found.items():
        colour, marker = style[name]
        across = [coordinate for (coordinate,) in one.coordinates]
        losses = [loss if math.isfinite(loss) else math.nan for loss in one.losses]
        (line,) = axes.plot(across, losses, color=colour, marker=marker, markersize=3.5)
        tip(line, name)
        finite = [pair for pair in zip(one.losses, across, strict=True) if math.isfinite(pair[0])]
        lowest[name] = min(finite)
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.set_ylabel("mean loss (nats)")
    legend(figure, style, [], lines=True)
    if kind == "update":
        axes.set_xlabel("along ΔW: −1 is the base, 0 the adapter")
        title, where = (
            "From the base through the adapter",
            "W0 + (1 + α)·ΔW: what more or less of it would do",
        )
    else:
        axes.set_xlabel("α, in row norms of " + _norm(found))
        title, where = (
            "Along a random direction",
            "one random direction, the same draw for all, scaled row by row",
        )
    told = "; ".join(f"{name} {loss:.2f} at {place:+.2f}" for name, (loss, place) in lowest.items())
    return Drawing(
        key=f"line-{kind}",
        title=title,
        caption=f"Training loss along {where}. One run of each setting.{others}",
        alt=f"Lowest loss on the line: {told}.",
        svg=svg(figure, f"line-{kind}"),
    )


def _norm(found: Mapping[str, Landscape]) -> str:
    return "ΔW" if next(iter(found.values())).norm == "update" else "W0 + ΔW"


def _planes(adapters: Sequence[AdapterAnalysis], kind: str) -> Drawing | None:
    found, others = _found(adapters, kind, SHOWN)
    if not found:
        return None
    lowest = {name: min(value for value in one.losses if math.isfinite(value)) for name, one in found.items()}
    where = (
        f"two random directions, scaled row by row to {_norm(found)}"
        if kind == "random"
        else "the plane that training's path mostly lies in; the line is the path"
    )
    return Drawing(
        key=f"landscape-{kind}",
        title="Loss landscapes" if kind == "random" else "Landscapes of the trajectories",
        caption=f"Loss around each adapter in ΔW space, over {where}. All at one scale.{others}",
        alt="Lowest loss in the plane: "
        + "; ".join(f"{name} {value:.2f}" for name, value in lowest.items())
        + ".",
        svg=svg(_landscape_row(found), f"landscape-{kind}"),
    )


def _landscape_row(found: Mapping[str, Landscape]) -> Figure:
    """Draw landscapes in panels, two beside each other, at one scale of colours."""
    low, high = shared_limits(found.values())
    # Far corners of a sharp one would leave the others one colour: what is above is the last colour.
    every = [value for one in found.values() for value in one.losses if math.isfinite(value)]
    high = min(high, float(np.quantile(every, 0.9)) + 0.1 * (high - low))
    levels = np.linspace(low, max(high, low + 1e-6), LEVELS + 1)
    rows = -(-len(found) // 2)
    figure = Figure(figsize=(4.5, 2.15 * rows + 0.75), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
    FigureCanvasSVG(figure)
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (name, one) in zip(panels, found.items(), strict=False):
        first, second, losses = grid_of(one)
        shown = np.where(np.isnan(losses), high, losses)
        drawn = axes.contourf(first, second, shown.T, levels, cmap=COLOURS, extend="max")
        # Not the page's colours: what is below them is the same by day and by night.
        for colour, width in (("#000000", 3.0), ("#ffffff", 1.5)):
            if one.path:
                axes.plot(
                    *zip(*one.path, strict=True), color=colour, linewidth=width, marker="o", markersize=width
                )
            axes.plot(0, 0, "+", color=colour, markersize=8 + width, markeredgewidth=width)
        axes.set_title(short(name, 24), fontsize=11)
        axes.tick_params(labelsize=11)
        axes.grid(visible=False)
        axes.locator_params(nbins=3)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    figure.colorbar(
        drawn, ax=panels.tolist(), location="bottom", label="mean loss (nats)", aspect=40, shrink=0.9,
        ticks=levels[::3], format="%.3g",
    )  # fmt: skip
    return figure

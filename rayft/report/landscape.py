"""Loss landscapes: on the report's page those of several adapters, in a tracker's files those of one.

Planes are filled contours at one scale of colours (viridis, which colour-blind readers can read too), or a
surface in three dimensions; lines are curves. A loss that is NaN or infinite gets the highest colour of a
plane, and is a gap in a surface and in a curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rayft.analysis.record import AdapterAnalysis, Landscape
from rayft.errors import ReportError
from rayft.report.style import (
    INK,
    PAPER,
    SOFT,
    STYLE,
    Drawing,
    legend,
    new_figure,
    save,
    short,
    styles,
    svg,
    tip,
)

__all__ = ["contour_plot", "curve_plot", "landscape_figures", "surface_plot"]

LOSS = "mean loss (nats)"
COLOURS, LEVELS = "viridis", 12
SHOWN = 12
"""Most planes side by side on the page."""
OUTLINE, LINE = "#000000", "#fefefe"
"""Of what is drawn over a plane: no colours of the page, since a plane looks the same in both themes."""

Floats = npt.NDArray[np.float64]


def landscape_figures(adapters: Sequence[AdapterAnalysis]) -> list[Drawing]:
    """Draw the lines and planes that were measured of some adapters, one figure for each kind."""
    drawn = [_lines(adapters, kind) for kind in ("update", "line")]
    drawn += [_planes(adapters, kind) for kind in ("random", "trajectory")]
    return [drawing for drawing in drawn if drawing is not None]


@mpl.rc_context(STYLE)
def contour_plot(landscape: Landscape, title: str, path: str | Path) -> Path:
    """Write a plane as filled contours, with the path of training where the landscape has one.

    Args:
        landscape: of two coordinates, on a grid.
        title: whose landscape it is.
        path: the file, .svg or .png.

    Raises:
        ReportError: if the points are no grid, or no loss is finite.
    """
    levels = _levels([landscape])
    figure = new_figure(4.8, width=6.0)
    axes = figure.add_subplot()
    drawn = _contours(axes, landscape, levels)
    axes.contour(drawn, colors=PAPER, linewidths=0.4, alpha=0.6)
    figure.colorbar(drawn, ax=axes, label=LOSS, ticks=MaxNLocator(7))
    _name_ends(axes, landscape)
    if not landscape.path:
        axes.set_aspect("equal")
    axes.locator_params(nbins=5)
    axes.set_xlabel(_label(landscape, 0))
    axes.set_ylabel(_label(landscape, 1))
    axes.set_title(title)
    return save(figure, path)


@mpl.rc_context(STYLE)
def surface_plot(landscape: Landscape, title: str, path: str | Path) -> Path:
    """Write a plane as a surface in three dimensions; arguments and errors as for `contour_plot`."""
    first, second, values = grid_of(landscape)
    levels = _levels([landscape])
    low, high = levels[0], levels[-1]
    figure = new_figure(5.2, width=6.4)
    axes: Any = figure.add_subplot(projection="3d")
    across, along = np.meshgrid(first, second, indexing="ij")
    # Cut off above, where a far corner would otherwise leave the box.
    drawn = axes.plot_surface(
        across, along, np.clip(values, low, high), cmap=COLOURS, vmin=low, vmax=high,
        rcount=len(first), ccount=len(second), linewidth=0.15, edgecolor=PAPER,
    )  # fmt: skip
    axes.set_zlim(low, high)
    axes.view_init(elev=28, azim=-58)
    # The layout engine doesn't see the labels of three axes.
    axes.set_box_aspect(None, zoom=0.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(_label(landscape, 0), labelpad=6)
    axes.set_ylabel(_label(landscape, 1), labelpad=6)
    axes.set_title(title)
    figure.colorbar(drawn, ax=axes, label=LOSS, shrink=0.7, pad=0.1, ticks=MaxNLocator(7))
    return save(figure, path)


@mpl.rc_context(STYLE)
def curve_plot(landscape: Landscape, title: str, path: str | Path) -> Path:
    """Write a line through an adapter as a curve.

    Args:
        landscape: of one coordinate.
        title: whose landscape it is.
        path: the file, .svg or .png.

    Raises:
        ReportError: if the landscape has two coordinates, or no loss is finite.
    """
    if any(len(point) != 1 for point in landscape.coordinates):
        raise ReportError("a curve has one coordinate and this landscape two: draw it with contour_plot")
    _limits([landscape])
    figure = new_figure(3.8, width=6.0)
    axes = figure.add_subplot()
    _curves(axes, {title: landscape})
    axes.set_title(title)
    return save(figure, path)


def grid_of(landscape: Landscape) -> tuple[Floats, Floats, Floats]:
    """Return the two axes (A, B numbers) and the losses (A × B, NaN where not finite) of points on a grid.

    The points may come in any order.

    Raises:
        ReportError: if the points have one coordinate, or are no grid.
    """
    if not landscape.coordinates or any(len(point) != 2 for point in landscape.coordinates):
        raise ReportError("a plane has two coordinates: draw a line with curve_plot")
    points = np.asarray(landscape.coordinates)
    (first, row), (second, column) = (np.unique(points[:, axis], return_inverse=True) for axis in (0, 1))
    values = np.full((len(first), len(second)), np.nan)
    values[row, column] = landscape.losses
    if len(first) < 2 or len(second) < 2 or len(set(landscape.coordinates)) != values.size:
        raise ReportError(
            "these points are no grid, and a plane is drawn of a grid: measure at grid_2d's points"
        )
    return first, second, np.where(np.isfinite(values), values, np.nan)


def _limits(landscapes: Iterable[Landscape]) -> tuple[float, float, list[float]]:
    """Return the least and the greatest finite loss, and all of them."""
    finite = [loss for landscape in landscapes for loss in landscape.losses if math.isfinite(loss)]
    if not finite:
        raise ReportError("none of these losses is finite: measure a smaller extent")
    return min(finite), max(finite), finite


def _levels(landscapes: Sequence[Landscape]) -> Floats:
    """Return the bounds of the colours, one scale for all landscapes."""
    low, high, finite = _limits(landscapes)
    # Far corners of a sharp landscape would leave all else one colour: what is above gets the last colour.
    high = min(high, float(np.quantile(finite, 0.9)) + 0.1 * (high - low))
    return np.linspace(low, high if high > low else low + max(abs(low), 1.0) / 100, LEVELS + 1)


def _contours(axes: Axes, landscape: Landscape, levels: Floats) -> QuadContourSet:
    """Fill the axes with the plane, and draw the path of training and the adapter's place over it."""
    first, second, losses = grid_of(landscape)
    shown = np.where(np.isnan(losses), levels[-1], losses)
    drawn = axes.contourf(first, second, shown.T, levels, cmap=COLOURS, extend="max")
    for colour, width in ((OUTLINE, 3.0), (LINE, 1.5)):
        if landscape.path:
            axes.plot(
                *zip(*landscape.path, strict=True),
                color=colour,
                linewidth=width,
                marker="o",
                markersize=width,
            )
        axes.plot(0, 0, "+", color=colour, markersize=8 + width, markeredgewidth=width)
    axes.grid(visible=False)
    return drawn


def _name_ends(axes: Axes, landscape: Landscape) -> None:
    box = {"boxstyle": "round,pad=0.2", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.85}
    ends = {"start": landscape.path[0], "end": landscape.path[-1]} if landscape.path else {}
    for name, point in ends.items():
        axes.annotate(
            name, (point[0], point[1]), xytext=(6, 6), textcoords="offset points", color=INK, bbox=box
        )


def _curves(axes: Axes, landscapes: Mapping[str, Landscape]) -> dict[str, tuple[str, str]]:
    """Draw lines as curves, and return the style of each."""
    style = styles([*landscapes])
    for name, one in landscapes.items():
        colour, marker = style[name]
        points = sorted(zip(one.coordinates, one.losses, strict=True))
        losses = [loss if math.isfinite(loss) else math.nan for _, loss in points]
        (line,) = axes.plot([at for (at,), _ in points], losses, color=colour, marker=marker, markersize=3.5)
        tip(line, name)
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.set_xlabel(_label(next(iter(landscapes.values())), 0))
    axes.set_ylabel(LOSS)
    return style


def _label(landscape: Landscape, axis: int) -> str:
    if landscape.kind == "update":
        return "along ΔW: −1 is the base, 0 the adapter"
    if landscape.kind == "random":
        return f"direction {axis + 1} (in row norms of {_norm(landscape)})"
    share = f" ({landscape.explained[axis]:.0%} of variance)" if landscape.explained else ""
    return f"principal direction {axis + 1}{share}"


def _norm(landscape: Landscape) -> str:
    return "ΔW" if landscape.norm == "update" else "W0 + ΔW"


def _found(
    adapters: Sequence[AdapterAnalysis], kind: str, most: int | None = None
) -> tuple[dict[str, Landscape], str]:
    """Return the landscapes that have a finite loss, and a sentence that names the others."""
    measured = [one for one in adapters if kind in one.landscapes][:most]
    every = {one.name: Landscape.from_json(one.landscapes[kind]) for one in measured}
    drawn = {name: one for name, one in every.items() if one.finite}
    others = ", ".join(name for name in every if name not in drawn)
    return drawn, f" No loss is finite for {others}." if others else ""


def _lines(adapters: Sequence[AdapterAnalysis], kind: str) -> Drawing | None:
    found, others = _found(adapters, kind)
    if not found:
        return None
    figure = new_figure(3.9, names=len(found))
    legend(figure, _curves(figure.add_subplot(), found), lines=True)
    if kind == "update":
        title = "From the base through the adapter"
        where = "W0 + (1 + α)·ΔW: what more or less of the update would do"
    else:
        title = "Along a random direction"
        where = "one random direction, the same draw for all adapters, scaled row by row"
    lowest = {name: min(_finite(one)) for name, one in found.items()}
    words = "; ".join(f"{name} {loss:.2f} at {at:+.2f}" for name, (loss, (at,)) in lowest.items())
    return Drawing(
        key=f"line-{kind}",
        title=title,
        caption=f"Training loss along {where}. One run of each setting.{others}",
        alt=f"Lowest loss on the line: {words}.",
        svg=svg(figure, f"line-{kind}"),
    )


def _planes(adapters: Sequence[AdapterAnalysis], kind: str) -> Drawing | None:
    found, others = _found(adapters, kind, SHOWN)
    if not found:
        return None
    where = (
        f"two random directions, scaled row by row to {_norm(next(iter(found.values())))}"
        if kind == "random"
        else "the plane that most of the path of training lies in; the line is the path"
    )
    lowest = "; ".join(f"{name} {min(_finite(one))[0]:.2f}" for name, one in found.items())
    return Drawing(
        key=f"landscape-{kind}",
        title="Loss landscapes" if kind == "random" else "Landscapes of the trajectories",
        caption=f"Loss around each adapter in ΔW space, over {where}. All have one scale.{others}",
        alt=f"Lowest loss in the plane: {lowest}.",
        svg=svg(_panels(found), f"landscape-{kind}"),
    )


def _finite(landscape: Landscape) -> list[tuple[float, tuple[float, ...]]]:
    """Return the finite losses, each with its point."""
    every = zip(landscape.losses, landscape.coordinates, strict=True)
    return [(loss, point) for loss, point in every if math.isfinite(loss)]


def _panels(landscapes: Mapping[str, Landscape]) -> Figure:
    """Draw planes in panels, two beside each other."""
    levels = _levels([*landscapes.values()])
    rows = -(-len(landscapes) // 2)
    figure = new_figure(2.15 * rows + 0.75)
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (name, one) in zip(panels, landscapes.items(), strict=False):
        drawn = _contours(axes, one, levels)
        axes.set_title(short(name, 24), fontsize=11)
        axes.locator_params(nbins=3)
    for axes in panels[len(landscapes) :]:
        axes.set_axis_off()
    figure.colorbar(
        drawn, ax=panels.tolist(), location="bottom", label=LOSS, aspect=40, shrink=0.9, ticks=levels[::3],
        format="%.3g",
    )  # fmt: skip
    return figure

"""Loss landscapes as pictures, SVG or PNG by the file's name: contours, surfaces, and curves.

Colours are viridis, which the colour-blind read too. With limits given several pictures share a scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from rayft.analysis.landscape import Landscape
from rayft.errors import ReportError

__all__ = ["COLOURS", "contour_plot", "curve_plot", "shared_limits", "surface_plot"]

INK, SOFT, RED, GRID = "#1f2328", "#6e7781", "#c2410c", "#d0d7de"
LOSS = "mean loss (nats)"
COLOURS = "viridis"
LEVELS = 24
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rayft",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}
CURVES: Any = (
    {"color": "#0a60c2", "linestyle": "-"},
    {"color": "#c2410c", "linestyle": "--"},
    {"color": "#1a7f5a", "linestyle": "-."},
    {"color": "#7a3ea8", "linestyle": ":"},
)

Floats = npt.NDArray[np.float64]


def shared_limits(landscapes: Iterable[Landscape]) -> tuple[float, float]:
    """Give the least and the greatest finite loss of several, for plots that can be compared.

    Raises:
        ReportError: if no loss is finite.
    """
    finite = [loss for landscape in landscapes for loss in landscape.losses if np.isfinite(loss)]
    if not finite:
        raise ReportError("none of these losses is finite: measure a smaller extent")
    return min(finite), max(finite)


def contour_plot(
    landscape: Landscape, title: str, path: str | Path, limits: tuple[float, float] | None = None
) -> Path:
    """Draw a plane as filled contours, with a trajectory's path over it; losses above the limits are grey.

    Args:
        landscape: of two coordinates, on a grid.
        title: whose it is.
        path: the file, .svg or .png.
        limits: least and greatest loss of the colour scale; the landscape's own where not given.

    Raises:
        ReportError: if the points are no grid, or no loss is finite.
    """
    first, second, values = grid_of(landscape)
    levels = _levels(limits or shared_limits([landscape]))
    with mpl.rc_context(STYLE):
        figure = _figure((6.0, 4.8))
        axes = figure.add_subplot()
        axes.set_facecolor(GRID)
        drawn = axes.contourf(first, second, values.T, levels=levels, cmap=COLOURS)
        axes.contour(first, second, values.T, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
        figure.colorbar(drawn, ax=axes, label=LOSS, ticks=MaxNLocator(7))
        if landscape.path:
            _path(axes, landscape)
        else:
            axes.plot([0], [0], marker="+", markersize=11, markeredgewidth=2, color=RED)
            axes.set_aspect("equal")
        axes.locator_params(nbins=5)
        axes.set_xlabel(_label(landscape, 0))
        axes.set_ylabel(_label(landscape, 1))
        axes.set_title(title)
        return _save(figure, path)


def surface_plot(
    landscape: Landscape, title: str, path: str | Path, limits: tuple[float, float] | None = None
) -> Path:
    """Draw a plane as a surface in three dimensions; arguments and errors as for `contour_plot`."""
    first, second, values = grid_of(landscape)
    low, high = limits or shared_limits([landscape])
    # Cut off above, where a far corner would otherwise leave the box.
    shown = np.where(np.isfinite(values), np.clip(values, low, high), np.nan)
    with mpl.rc_context(STYLE):
        figure = _figure((6.4, 5.2))
        axes: Any = figure.add_subplot(projection="3d")
        across, along = np.meshgrid(first, second, indexing="ij")
        drawn = axes.plot_surface(
            across, along, shown, cmap=COLOURS, vmin=low, vmax=high,
            rcount=len(first), ccount=len(second), linewidth=0.15, edgecolor="white",
        )  # fmt: skip
        axes.set_zlim(*_room(low, high))
        axes.view_init(elev=28, azim=-58)
        # The layout engine doesn't see the labels of three axes.
        axes.set_box_aspect(None, zoom=0.88)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(_label(landscape, 0), labelpad=6)
        axes.set_ylabel(_label(landscape, 1), labelpad=6)
        axes.set_title(title)
        figure.colorbar(drawn, ax=axes, label=LOSS, shrink=0.7, pad=0.1, ticks=MaxNLocator(7))
        return _save(figure, path)


def curve_plot(
    landscapes: Mapping[str, Landscape],
    title: str,
    path: str | Path,
    limits: tuple[float, float] | None = None,
) -> Path:
    """Draw lines through one or several adapters as curves.

    Args:
        landscapes: name → landscape of one coordinate.
        title: what they are.
        path: the file, .svg or .png.
        limits: least and greatest loss of the axis; all landscapes' own where not given.

    Raises:
        ReportError: if one has two coordinates, or no loss is finite.
    """
    if any(len(point) != 1 for landscape in landscapes.values() for point in landscape.coordinates):
        raise ReportError("a curve is drawn of one coordinate: draw these landscapes as contours")
    low, high = limits or shared_limits(landscapes.values())
    with mpl.rc_context(STYLE):
        figure = _figure((6.0, 3.8))
        axes = figure.add_subplot()
        for number, (name, landscape) in enumerate(landscapes.items()):
            points = sorted(zip(landscape.coordinates, landscape.losses, strict=True))
            across = [coordinate for (coordinate,), _ in points]
            style = CURVES[number % len(CURVES)]
            axes.plot(across, [loss for _, loss in points], label=name, linewidth=1.8, **style)
        axes.axvline(0, color=SOFT, linewidth=0.8)
        axes.set_ylim(*_room(low, high))
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(_label(next(iter(landscapes.values())), 0))
        axes.set_ylabel(LOSS)
        axes.set_title(title)
        if len(landscapes) > 1:
            axes.legend(frameon=False)
        return _save(figure, path)


def grid_of(landscape: Landscape) -> tuple[Floats, Floats, Floats]:
    """Give both axes and the losses (A × B) of points that are a grid, whatever their order."""
    if not landscape.coordinates or any(len(point) != 2 for point in landscape.coordinates):
        raise ReportError("a plane is drawn of two coordinates: draw a line with curve_plot")
    points = np.asarray(landscape.coordinates)
    (first, row), (second, column) = (np.unique(points[:, axis], return_inverse=True) for axis in (0, 1))
    values = np.full((len(first), len(second)), np.nan)
    values[row, column] = landscape.losses
    if len(first) < 2 or len(second) < 2 or len(set(landscape.coordinates)) != values.size:
        raise ReportError("these points are no grid, of which a plane is drawn: measure grid_2d's")
    return first, second, np.where(np.isfinite(values), values, np.nan)


def _levels(limits: tuple[float, float]) -> Floats:
    return np.linspace(*_room(*limits, share=0.0), LEVELS + 1)


def _room(low: float, high: float, share: float = 0.04) -> tuple[float, float]:
    """Widen by a share of the range; a flat landscape gets a range at all."""
    room = share * (high - low) if high > low else max(abs(low), 1.0) / 100
    return low - room, high + room


def _path(axes: Axes, landscape: Landscape) -> None:
    across, along = zip(*landscape.path, strict=True)
    axes.plot(across, along, color="white", linewidth=3.4)
    axes.plot(across, along, color=RED, linewidth=1.6, marker="o", markersize=4.5, markeredgecolor="white")
    for name, place in (("start", 0), ("end", -1)):
        axes.annotate(
            name,
            (across[place], along[place]),
            xytext=(6, 6),
            textcoords="offset points",
            color=INK,
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )


def _label(landscape: Landscape, axis: int) -> str:
    if landscape.kind == "update":
        return "along ΔW (−1 is the base, 0 the adapter)"
    if landscape.kind == "random":
        rows = "ΔW" if landscape.norm == "update" else "W0 + ΔW"
        return f"direction {axis + 1} (in row norms of {rows})"
    share = f" ({landscape.explained[axis]:.0%} of variance)" if landscape.explained else ""
    return f"principal direction {axis + 1}{share}"


def _figure(size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, dpi=130, facecolor="white", layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date the same landscape gives the same file.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path

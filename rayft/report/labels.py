"""Names beside points, placed so that they cover neither points nor lines nor one another.

A name is written at the first free of sixteen places around its point, and left out where none is free.
adjustText 1.4.0, which moves names by forces, was tried instead: in the figures of a sweep with 66 trials 3
to 10 pairs of 14 names overlapped, since it leaves none out, and a figure took 2 to 5 s on 2 cores.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from rayft.report.style import SOFT, short

__all__ = ["place"]

Line = Sequence[tuple[float, float]]
"""Corners in data units."""
Boxes = npt.NDArray[np.float64]
"""Left, lower, right and upper edge in pixels, of one box or a row for each of several."""

_SIZE = 11.0
# Points from the marker's centre, and alignment: right, left, above, below, then further away.
_SPOTS = (
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (8, 10, "left", "bottom"),
    (-8, 10, "right", "bottom"),
    (8, -10, "left", "top"),
    (-8, -10, "right", "top"),
    (12, 22, "left", "bottom"),
    (-12, 22, "right", "bottom"),
    (12, -22, "left", "top"),
    (-12, -22, "right", "top"),
    (16, 36, "left", "bottom"),
    (-16, 36, "right", "bottom"),
    (16, -36, "left", "top"),
    (-16, -36, "right", "top"),
)
_BEFORE = {"left": 0.0, "right": 1.0, "center": 0.5, "bottom": 0.0, "top": 1.0}
"""Share of a name's width or height that lies before the place where it is aligned."""


def place(
    axes: Axes, points: Sequence[tuple[float, float, str]], lines: Sequence[Line] = (), *, must: bool = True
) -> list[str]:
    """Write names at (x, y) in data units, the first ones first, and return those that found no room.

    The figure must have been drawn once, so that positions are final.

    Args:
        axes: where the points are drawn.
        points: what to name.
        lines: what names should not cover either.
        must: whether to cover one of these lines rather than leave a name out.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = figure.dpi / 72
    centres = axes.transData.transform([(x, y) for x, y, _ in points]) if points else np.zeros((0, 2))
    half = 5 * scale
    markers = np.hstack([centres - half, centres + half])
    names = _stacked([np.array([text.get_window_extent().extents]) for text in axes.texts])
    drawn = _stacked([_boxes(axes.transData.transform(line)) for line in lines])
    left_out = []
    for number, (point, centre) in enumerate(zip(points, centres, strict=True)):
        others = np.delete(markers, number, axis=0)
        found = _write(axes, point, centre, _stacked([others, drawn]), names)
        if found is None and must:
            found = _write(axes, point, centre, others, names)
        if found is None:
            left_out.append(point[2])
        else:
            names = _stacked([names, found])
    return left_out


def _write(
    axes: Axes, point: tuple[float, float, str], centre: Boxes, shapes: Boxes, names: Boxes
) -> Boxes | None:
    """Write a name at the first free place.

    A name keeps off shapes and other names. The thin line that leads to a name further away keeps off other
    names only.

    Returns:
        The boxes that the name covers; None if no place is free.
    """
    x, y, name = point
    text = axes.annotate(short(name), (x, y), (0, 0), textcoords="offset points", fontsize=_SIZE, zorder=6)
    extent, inside = text.get_window_extent(), axes.get_window_extent().extents
    size, scale = np.array([extent.width, extent.height]), axes.figure.dpi / 72
    for right, up, horizontal, vertical in _SPOTS:
        at = centre + scale * np.array([right, up])
        corner = at - size * (_BEFORE[horizontal], _BEFORE[vertical])
        box = np.concatenate([corner, corner + size])
        lead = _boxes([centre, at]) if abs(up) > 10 else np.zeros((0, 4))
        within = (box[:2] >= inside[:2]).all() and (box[2:] <= inside[2:]).all()
        if within and not _overlap(box, shapes) and not any(_overlap(one, names) for one in [box, *lead]):
            text.set(position=(right, up), ha=horizontal, va=vertical)
            if len(lead):
                _lead(axes, (x, y), (right, up))
            return np.vstack([box, lead])
    text.remove()
    return None


def _overlap(box: Boxes, others: Boxes) -> bool:
    return bool(((box[:2] < others[:, 2:]) & (others[:, :2] < box[2:])).all(axis=1).any())


def _stacked(boxes: Sequence[Boxes]) -> Boxes:
    return np.vstack([np.zeros((0, 4)), *boxes])


def _boxes(corners: Sequence[Boxes] | Boxes) -> Boxes:
    """Cover a line, in pixels, with small boxes."""
    found = []
    for start, end in itertools.pairwise(corners):
        parts = max(1, math.ceil(math.dist(start, end) / 4))
        shares = np.linspace(0, 1, parts + 1)[:, None]
        found.append(np.asarray(start) + shares * (np.asarray(end) - np.asarray(start)))
    middles = np.vstack(found) if found else np.zeros((0, 2))
    return np.hstack([middles - 1, middles + 1])


def _lead(axes: Axes, point: tuple[float, float], offset: tuple[int, int]) -> None:
    """Draw a thin line from a point to its name."""
    line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
    axes.annotate("", point, offset, textcoords="offset points", arrowprops=line, zorder=2)

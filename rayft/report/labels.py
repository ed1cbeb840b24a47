"""Names beside points, placed so that they cover neither points nor one another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from rayft.report.canvas import SOFT, short

__all__ = ["place"]

Line = Sequence[tuple[float, float]]
"""Corners in data units."""

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
)


def place(
    axes: Axes, points: Sequence[tuple[float, float, str]], lines: Sequence[Line] = (), *, must: bool = True
) -> list[str]:
    """Write names at (x, y) in data units, first come first served; give those that found no room.

    The figure must have been drawn once, so that positions are final.

    Args:
        axes: where the points are drawn.
        points: what to name.
        lines: what names should not cover either.
        must: cover a line rather than leave a name out.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in centres]
    taken += [text.get_window_extent() for text in axes.texts]
    drawn = [box for line in lines for box in _boxes(axes, line)]
    left_out = []
    for point, own in zip(points, list(taken), strict=False):
        others = [box for box in taken if box is not own]
        box = _write(axes, point, [*others, *drawn]) or (_write(axes, point, others) if must else None)
        if box is None:
            left_out.append(point[2])
        else:
            taken.append(box)
    return left_out


def _write(axes: Axes, point: tuple[float, float, str], taken: Sequence[Bbox]) -> Bbox | None:
    """Write a name at the first spot that is free; None if there is none."""
    x, y, name = point
    inside = axes.get_window_extent()
    for right, up, horizontal, vertical in _SPOTS:
        text = axes.annotate(
            short(name),
            (x, y),
            (right, up),
            textcoords="offset points",
            ha=horizontal,
            va=vertical,
            fontsize=_SIZE,
            zorder=6,
        )
        box = text.get_window_extent()
        within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if within and not any(box.overlaps(other) for other in taken):
            if abs(up) > 10:
                _lead(axes, (x, y), (right, up))
            return box
        text.remove()
    return None


def _boxes(axes: Axes, line: Line) -> list[Bbox]:
    """Cover a line with small boxes."""
    found = []
    corners = [axes.transData.transform(corner) for corner in line]
    for (x, y), (to_x, to_y) in itertools.pairwise(corners):
        parts = max(1, math.ceil(math.hypot(to_x - x, to_y - y) / 4))
        for part in range(parts + 1):
            share = part / parts
            found.append(Bbox.from_bounds(x + share * (to_x - x) - 1, y + share * (to_y - y) - 1, 2, 2))
    return found


def _lead(axes: Axes, point: tuple[float, float], offset: tuple[int, int]) -> None:
    """Draw a thin line from a point to a name that stands off it."""
    line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
    axes.annotate("", point, offset, textcoords="offset points", arrowprops=line, zorder=2)

"""Names beside points, placed so that they cover neither points nor one another."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from rayft.report.canvas import SOFT, short

__all__ = ["place"]

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


def place(axes: Axes, points: Sequence[tuple[float, float, str]]) -> list[str]:
    """Write names at (x, y) in data units, first come first served; give those that found no room.

    The figure must have been drawn once, so that positions are final.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in centres]
    taken += [text.get_window_extent() for text in axes.texts]
    inside, left_out = axes.get_window_extent(), []
    for (x, y, name), own in zip(points, list(taken), strict=False):
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
            free = not any(box.overlaps(other) for other in taken if other is not own)
            if (
                free
                and inside.x0 <= box.x0
                and box.x1 <= inside.x1
                and inside.y0 <= box.y0 <= box.y1 <= inside.y1
            ):
                taken.append(box)
                if abs(up) > 10:
                    _lead(axes, (x, y), (right, up))
                break
            text.remove()
        else:
            left_out.append(name)
    return left_out


def _lead(axes: Axes, point: tuple[float, float], offset: tuple[int, int]) -> None:
    """Draw a thin line from a point to a name that stands off it."""
    line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
    axes.annotate("", point, offset, textcoords="offset points", arrowprops=line, zorder=2)

"""Names beside points, in figures too full for all of them."""

from __future__ import annotations

import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes

from rayft.report.labels import place
from rayft.report.style import STYLE, new_figure


def crowd(count: int, spread: float) -> tuple[Axes, list[tuple[float, float, str]]]:
    rng = np.random.default_rng(count)
    axes = new_figure(4.8).add_subplot()
    points = [
        (float(x), float(y), f"trial-{n}") for n, (x, y) in enumerate(rng.normal(0, spread, (count, 2)))
    ]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o")
    axes.set_xlim(-1, 1)
    axes.set_ylim(-1, 1)
    assert axes.figure
    axes.figure.canvas.draw()
    return axes, points


@pytest.mark.parametrize(("count", "spread"), [(5, 0.5), (12, 0.3), (60, 0.1)])
def test_names_cover_no_point_and_no_other_name(count: int, spread: float) -> None:
    with mpl.rc_context(STYLE):
        axes, points = crowd(count, spread)
        left_out = place(axes, points)
        written = {text.get_text(): text.get_window_extent() for text in axes.texts if text.get_text()}
    assert {name for _, _, name in points} == {*written, *left_out}
    assert len(written) + len(left_out) == count
    assert not any(one.overlaps(other) for one, other in itertools.combinations(written.values(), 2))
    for x, y, name in points:
        at = axes.transData.transform((x, y))
        assert not any(box.contains(*at) for other, box in written.items() if other != name)
    inside = axes.get_window_extent()
    assert all(
        inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in written.values()
    )
    assert (len(left_out) > 0) == (count == 60), "names are left out only where there is no room"


def test_the_first_names_get_the_room() -> None:
    with mpl.rc_context(STYLE):
        axes, points = crowd(60, 0.1)
        assert points[0][2] not in place(axes, points)


def test_a_line_is_covered_rather_than_a_name_left_out_only_where_that_is_asked_for() -> None:
    everywhere = [[(-1.0, y), (1.0, y)] for y in np.linspace(-1, 1, 80)]
    with mpl.rc_context(STYLE):
        axes, points = crowd(3, 0.3)
        assert place(axes, points, everywhere, must=False) == [name for _, _, name in points]
        assert place(axes, points, everywhere, must=True) == []

"""Landscapes as pictures: files, axes, and a scale that several share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import PIL.Image
import pytest

from rayft.analysis.landscape import Landscape, grid_1d, grid_2d
from rayft.errors import ReportError
from rayft.report import landscape as plots
from rayft.report.landscape import contour_plot, curve_plot, shared_limits, surface_plot


def plane(height: float = 1.0, **values: Any) -> Landscape:
    points = [tuple(point) for point in grid_2d(5, 1.0).tolist()]
    plain = {
        "kind": "random",
        "norm": "update",
        "coordinates": tuple(points),
        "losses": tuple(1 + height * (a * a + 0.1 * b) for a, b in points),
        "seed": 0,
        "targets": 10,
    }
    return Landscape(**{**plain, **values})


def line(norm: Any = "weight") -> Landscape:
    points = [tuple(point) for point in grid_1d(5, 1.0).tolist()]
    return plane(coordinates=tuple(points), losses=tuple(a * a for (a,) in points), norm=norm)


PATH = {
    "kind": "trajectory",
    "norm": None,
    "path": ((0.9, 0.1), (0.4, -0.3), (0.0, 0.0)),
    "explained": (0.8, 0.1),
}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = plots._save

    def keep(figure, path):
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


@pytest.mark.parametrize("draw", [contour_plot, surface_plot])
@pytest.mark.parametrize(
    "landscape", [plane(), plane(**PATH), plane(height=0.0)], ids=["random", "path", "flat"]
)
def test_planes_are_written_as_svg_and_png(tmp_path, draw, landscape) -> None:
    svg = draw(landscape, "an adapter", tmp_path / "new" / "plane.svg")
    text = svg.read_text()
    assert text.rstrip().endswith("</svg>")
    assert "an adapter" in text
    assert "mean loss (nats)" in text
    first = (
        "principal direction 1 (80% of variance)" if landscape.path else "direction 1 (in row norms of ΔW)"
    )
    assert first in text
    png = draw(landscape, "an adapter", tmp_path / "plane.png")
    corner = np.asarray(PIL.Image.open(png).convert("RGB"))[0, 0]
    assert corner.tolist() == [255, 255, 255]


def test_the_same_landscape_gives_the_same_file(tmp_path) -> None:
    one, other = (contour_plot(plane(**PATH), "x", tmp_path / f"{n}.svg").read_bytes() for n in "ab")
    assert one == other


def test_a_contour_has_the_landscapes_axes_and_values(tmp_path, drawn) -> None:
    # An order of points that no grid has.
    saved = plane()
    turned = plane(coordinates=saved.coordinates[::-1], losses=saved.losses[::-1])
    for landscape in (saved, turned):
        contour_plot(landscape, "x", tmp_path / "x.png")
        axes, bar = drawn[-1].axes
        assert axes.get_xlim() == (-1, 1)
        assert axes.get_ylim() == (-1, 1)
        assert bar.get_ylim() == shared_limits([landscape])
        filled = axes.collections[0]
        assert np.array_equal(np.asarray(filled.levels)[[0, -1]], shared_limits([landscape]))
        # Along the first coordinate the loss rises from the middle, along the second hardly.
        first, second, values = plots.grid_of(landscape)
        assert values[0, 2] == values[4, 2] == 2
        assert values[2, 4] == 1 + 0.1
        assert first.tolist() == second.tolist() == [-1, -0.5, 0, 0.5, 1]


def test_several_share_a_scale(tmp_path, drawn) -> None:
    both = [plane(), plane(height=3.0)]
    limits = shared_limits(both)
    assert limits == (min(both[1].losses), max(both[1].losses))
    for landscape in both:
        contour_plot(landscape, "x", tmp_path / "x.png", limits)
        surface_plot(landscape, "x", tmp_path / "x.png", limits)
        curve_plot({"x": line()}, "x", tmp_path / "x.png", limits)
    scales = {drawn[number].axes[0].collections[0].get_clim() for number in (0, 3)}
    assert len(scales) == 1
    assert {drawn[number].axes[0].collections[0].get_clim() for number in (1, 4)} == {limits}
    assert len({drawn[number].axes[0].get_zlim() for number in (1, 4)}) == 1
    assert len({drawn[number].axes[0].get_ylim() for number in (2, 5)}) == 1


def test_a_path_is_drawn_from_start_to_end(tmp_path, drawn) -> None:
    contour_plot(plane(**PATH), "x", tmp_path / "x.png")
    axes = drawn[0].axes[0]
    assert [tuple(point) for point in axes.lines[-1].get_xydata().tolist()] == list(PATH["path"])
    assert {text.get_text(): text.xy for text in axes.texts} == {"start": (0.9, 0.1), "end": (0.0, 0.0)}


def test_curves_of_several_are_named(tmp_path, drawn) -> None:
    text = curve_plot({"lora": line(), "cla": line()}, "both", tmp_path / "c.svg").read_text()
    assert "lora" in text
    assert "cla" in text
    assert "row norms of W0 + ΔW" in text
    one, other = drawn[0].axes[0].lines[:2]
    assert (one.get_color(), one.get_linestyle()) != (other.get_color(), other.get_linestyle())
    curve_plot({"lora": line("update")}, "one", tmp_path / "one.png")
    assert drawn[1].axes[0].get_legend() is None


def test_losses_that_are_not_finite_are_left_out(tmp_path, drawn) -> None:
    landscape = plane(losses=(math.nan, math.inf, *plane().losses[2:]))
    assert shared_limits([landscape]) == (min(plane().losses), max(plane().losses))
    contour_plot(landscape, "x", tmp_path / "x.png")
    surface_plot(landscape, "x", tmp_path / "x.png")
    with pytest.raises(ReportError, match="smaller extent"):
        shared_limits([plane(losses=(math.nan,) * 25)])


def test_what_can_not_be_drawn_is_refused(tmp_path) -> None:
    with pytest.raises(ReportError, match="draw a line with curve_plot"):
        contour_plot(line(), "x", tmp_path / "x.png")
    with pytest.raises(ReportError, match="draw these landscapes as contours"):
        curve_plot({"x": plane()}, "x", tmp_path / "x.png")
    some = plane(coordinates=plane().coordinates[1:], losses=plane().losses[1:])
    with pytest.raises(ReportError, match="no grid"):
        surface_plot(some, "x", tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []

"""Landscapes as files: their axes, their scale, and what can't be drawn."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from matplotlib.figure import Figure

from rayft.analysis.landscape import grid_1d, grid_2d
from rayft.analysis.record import Landscape
from rayft.errors import ReportError
from rayft.report.landscape import contour_plot, curve_plot, grid_of, surface_plot


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
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.mark.parametrize("draw", [contour_plot, surface_plot])
@pytest.mark.parametrize(
    "landscape", [plane(), plane(**PATH), plane(height=0.0)], ids=["random", "path", "flat"]
)
def test_planes_are_written_as_svg_and_as_png_on_white(
    tmp_path: Path, draw: Any, landscape: Landscape
) -> None:
    text = draw(landscape, "an adapter", tmp_path / "new" / "plane.svg").read_text()
    assert text.rstrip().endswith("</svg>")
    axis = "principal direction 1 (80% of variance)" if landscape.path else "direction 1 (in row norms of ΔW)"
    for wanted in ("an adapter", "mean loss (nats)", axis):
        assert wanted in text
    png = draw(landscape, "an adapter", tmp_path / "plane.png")
    corner = np.asarray(PIL.Image.open(png).convert("RGB"))[0, 0]
    assert corner.tolist() == [255, 255, 255]


def test_the_same_landscape_gives_the_same_file(tmp_path: Path) -> None:
    one, other = (contour_plot(plane(**PATH), "x", tmp_path / f"{n}.svg").read_bytes() for n in "ab")
    assert one == other


def test_points_of_a_grid_may_come_in_any_order() -> None:
    plain = plane()
    turned = plane(coordinates=plain.coordinates[::-1], losses=plain.losses[::-1])
    for landscape in (plain, turned):
        first, second, values = grid_of(landscape)
        assert first.tolist() == second.tolist() == [-1, -0.5, 0, 0.5, 1]
        # Along the first coordinate the loss rises from the middle, along the second it hardly does.
        assert values[0, 2] == values[4, 2] == 2
        assert values[2, 4] == 1 + 0.1


def test_a_contour_spans_the_grid_and_its_losses(tmp_path: Path, drawn: list[Figure]) -> None:
    contour_plot(plane(), "x", tmp_path / "x.png")
    axes, bar = drawn[0].axes
    assert axes.get_xlim() == axes.get_ylim() == (-1, 1)
    assert bar.get_ylim() == (min(plane().losses), max(plane().losses))


def test_one_sharp_corner_leaves_the_colours_to_the_other_losses(tmp_path: Path, drawn: list[Figure]) -> None:
    sharp = plane(losses=(1000.0, *plane().losses[1:]))
    for draw in (contour_plot, surface_plot):
        draw(sharp, "x", tmp_path / "x.png")
        low, high = drawn[-1].axes[0].collections[0].get_clim()
        assert low == min(sharp.losses)
        assert high < 110


def test_a_path_is_drawn_from_start_to_end(tmp_path: Path, drawn: list[Figure]) -> None:
    contour_plot(plane(**PATH), "x", tmp_path / "x.png")
    axes = drawn[0].axes[0]
    drawn_paths = [[tuple(point) for point in line.get_xydata().tolist()] for line in axes.lines]
    assert list(PATH["path"]) in drawn_paths  # type: ignore[call-overload]
    assert {text.get_text(): text.xy for text in axes.texts} == {"start": (0.9, 0.1), "end": (0.0, 0.0)}


def test_a_curve_names_its_direction(tmp_path: Path) -> None:
    text = curve_plot(line(), "lora", tmp_path / "c.svg").read_text()
    assert "lora" in text
    assert "row norms of W0 + ΔW" in text
    assert (
        "along ΔW"
        in curve_plot(plane(**{**vars(line()), "kind": "update"}), "x", tmp_path / "u.svg").read_text()
    )


@pytest.mark.parametrize("draw", [contour_plot, surface_plot])
def test_losses_that_are_not_finite_do_not_stretch_the_scale(
    tmp_path: Path, drawn: list[Figure], draw: Any
) -> None:
    draw(plane(losses=(math.nan, math.inf, *plane().losses[2:])), "x", tmp_path / "x.png")
    assert drawn[0].axes[0].collections[0].get_clim()[1] <= max(plane().losses)


def test_what_can_not_be_drawn_is_refused(tmp_path: Path) -> None:
    some = plane(coordinates=plane().coordinates[1:], losses=plane().losses[1:])
    nowhere = plane(losses=(math.nan,) * 25)
    for draw, landscape, why in (
        (contour_plot, line(), "draw a line with curve_plot"),
        (curve_plot, plane(), "draw it with contour_plot"),
        (surface_plot, some, "no grid"),
        (contour_plot, nowhere, "none of these losses is finite: measure a smaller extent"),
    ):
        with pytest.raises(ReportError, match=re.escape(why)):
            draw(landscape, "x", tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []

"""The colours of figures: those of the page's themes, told apart from what is the same in both."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import PIL.Image
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rayft.report import SweepRecord, spectrum
from rayft.report.landscape import COLOURS, LINE, OUTLINE
from rayft.report.render import html
from rayft.report.spectrum import spectrum_plot
from rayft.report.style import DARK, LIGHT, new_figure, short, styles, svg, tip
from tests.unit.report.example import example


def test_the_page_defines_both_themes() -> None:
    page = html(
        SweepRecord.model_validate({**example().model_dump(), "trials": [], "squeezed": [], "winner": None})
    )
    for theme in (LIGHT, DARK):
        assert " ".join(f"--{name}: {colour};" for name, colour in theme.items()) in page


def test_every_colour_of_the_page_has_its_own_in_the_dark() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT), "equal colours would become one variable"


def test_no_colour_of_a_plane_is_taken_for_one_of_the_page() -> None:
    planes = {to_hex(colour) for colour in mpl.colormaps[COLOURS](np.arange(256))} | {OUTLINE, LINE}
    assert not planes & set(LIGHT.values())


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2.2."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_and_text_stand_out_from_the_paper(theme: dict[str, str]) -> None:
    for name, colour in theme.items():
        low, high = sorted((luminance(colour), luminance(theme["paper"])))
        # WCAG 2.2: 4.5 for text, 3 for graphics.
        least = {"paper": 1, "grid": 1}.get(name, 3 if name.startswith("series") else 4.5)
        assert (high + 0.05) / (low + 0.05) >= least, name


def test_each_of_many_names_looks_different() -> None:
    names = [f"n{index:02}" for index in range(49)]
    assert len(set(styles(names).values())) == 49
    assert styles(names)["n07"] == styles([*reversed(names), "n07"])["n07"]


def test_a_long_name_keeps_its_end() -> None:
    assert short("lora") == "lora"
    assert short("lora-r16-with-a-long-name-lr0.0005-s0") == "lora-r16-wi…lr0.0005-s0"[:11] + "…r0.0005-s0"


def test_text_under_the_pointer_is_no_markup() -> None:
    figure = new_figure(2.0)
    (line,) = figure.add_subplot().plot([0, 1], [0, 1])
    tip(line, "<b>&")
    drawn = svg(figure, "k")
    assert "<title>&lt;b&gt;&amp;</title>" in drawn
    assert "tip-" not in drawn


@pytest.mark.parametrize("ranks", [{"a": 2, "b": 2}, {"a": 1, "b": 3}])
def test_a_spectrum_is_written_also_of_modules_that_have_none(tmp_path: Path, ranks: dict[str, int]) -> None:
    spectra = {"a": (3.0, 1.0, 0.1), "b": (2.0, 0.0), "zero": (0.0, 0.0)}
    text = spectrum_plot(spectra, ranks, "squeezed", tmp_path / "s.svg", {}).read_text()
    assert "squeezed: 3 modules" in text
    assert "mathdefault" not in text, "numbers, not TeX, which is not read in these figures"
    assert ("ranks 1 to 3" if ranks["a"] == 1 else "rank 2") in text
    picture = PIL.Image.open(spectrum_plot(spectra, ranks, "squeezed", tmp_path / "s.png", {}))
    assert picture.size == (1300, 520)


def test_energy_of_values_that_were_not_computed_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(spectrum, "save", lambda figure, path: drawn.append(figure))
    spectrum_plot({"a": (2.0, 1.0)}, {"a": 1}, "squeezed", tmp_path / "s.svg", {"a": 3.0})
    right = drawn[0].axes[1]
    assert [*right.lines[0].get_ydata()] == [0.0, 4 / 8, 5 / 8]

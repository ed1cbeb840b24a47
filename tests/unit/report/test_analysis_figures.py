"""The figures of an analysis: which are drawn, of which adapters, and what they say."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from rayft.analysis.predict import Run, correlations
from rayft.analysis.record import Gap, SweepAnalysis
from rayft.report.analysis_figures import analysis_figures
from tests.unit.report.example import adapter, example_analysis, line, plane


@pytest.fixture(scope="module")
def analysis() -> SweepAnalysis:
    return example_analysis()


@pytest.mark.parametrize("broken", [1, 3])
def test_a_landscape_that_is_nowhere_finite_is_named_and_not_drawn(
    analysis: SweepAnalysis, broken: int
) -> None:
    def diverged(raw: dict[str, Any]) -> dict[str, Any]:
        return {**raw, "losses": ["nan"] * len(raw["losses"])}

    adapters = [one for one in analysis.adapters if one.name.endswith("s0")]
    for index in range(broken):
        one = adapters[index]
        worst = {"landscapes": {kind: diverged(raw) for kind, raw in one.landscapes.items()}}
        nothing = {"gap": Gap(train=math.nan, held_out=math.nan, low=math.nan, high=math.nan, n=4)}
        adapters[index] = one.model_copy(update=worst | nothing)
    found = analysis.model_copy(update={"adapters": tuple(adapters)})
    drawn = {one.key: one.caption for one in analysis_figures(found)}
    planes = [key for key in drawn if key.startswith(("landscape", "line"))]
    assert len(planes) == (4 if broken == 1 else 0)
    assert all(drawn[key].endswith("No loss is finite for a-s0.") for key in planes)


def test_the_predictor_that_is_drawn_is_not_one_of_few_runs(analysis: SweepAnalysis) -> None:
    gaps = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    bare = {"spectra": {}, "median_spectrum": (), "intruders": None, "landscapes": {}}
    adapters = tuple(one.model_copy(update=bare) for one in analysis.adapters)
    without_curves = analysis.model_copy(update={"adapters": adapters, "angles": {}})

    def drawn(count: int, **measures: tuple[float, ...]) -> str:
        """Return the words of the first figure for so many runs; a short measure is missing in the last."""
        runs = [
            Run(str(i), gaps[i], {name: values[i] for name, values in measures.items() if i < len(values)})
            for i in range(count)
        ]
        found = without_curves.model_copy(update={"predictors": tuple(correlations(runs))})
        (gaps_figure,) = (one for one in analysis_figures(found) if one.key == "gaps")
        assert (", of those that 5 runs have." in gaps_figure.caption) == (count == 5)
        assert gaps_figure.title == ("The strongest predictor" if count > 5 else "The strongest correlation")
        return gaps_figure.alt

    few, strong = (3.0, 2.0, 1.0), (5.0, 4.0, 3.0, 1.0, 2.0)
    weak = (1.0, 3.0, 2.0, 4.0, 6.0, 5.0)
    assert "‖ΔW‖" in drawn(
        5, sam_sharpness=few, effective_rank_mean=(1.0, 3.0, 2.0, 5.0, 4.0), update_norm=strong
    )
    # Of six settings there is an interval.
    assert "effective rank" in drawn(6, sam_sharpness=few, update_norm=strong, effective_rank_mean=weak)


def test_a_long_spectrum_gets_few_markers_and_a_logarithmic_axis(analysis: SweepAnalysis) -> None:
    line_alone = {"intruders": None, "landscapes": {"line": line("random", 1.0)}}
    adapters = [one.model_copy(update=line_alone) for one in analysis.adapters]

    def drawn(length: int) -> str:
        long = adapter("whole-s0", "whole", 0.1, 2.0).model_copy(
            update={**line_alone, "median_spectrum": tuple(0.99**i for i in range(length))}
        )
        both = analysis.model_copy(update={"adapters": (long, *adapters)})
        return next(one.svg for one in analysis_figures(both) if one.key == "spectra")

    few, many = drawn(16), drawn(17 * 32)
    # Markers are references to one shape: about as many for 544 values as for 16 times fewer.
    assert many.count("<use") < few.count("<use") + 2 * 32
    ticks = [set(re.findall(r">([\d.]+)</text>", page)) for page in (few, many)]
    assert {"1", "10", "100"} <= ticks[1]
    assert not {"10", "100"} <= ticks[0]


def test_every_figure_is_described_in_words_and_fits_a_phone(analysis: SweepAnalysis) -> None:
    drawn = analysis_figures(analysis)
    assert [one.key for one in drawn] == [
        "gaps", "spectra", "intruders", "intruders-all", "angles", "line-update", "line-line",
        "landscape-random", "landscape-trajectory",
    ]  # fmt: skip
    for one in drawn:
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", one.svg)]
        assert min(sizes) >= 11
        assert "mathdefault" not in one.svg
        assert one.alt
    (angles,) = (one for one in drawn if one.key == "angles")
    assert "1 is a-s0, 2 is b-s0, 3 is c-s0" in angles.caption
    (plane_,) = (one for one in drawn if one.key == "landscape-random")
    assert "a-s0 1.00; b-s0 1.00; c-s0 1.00" in plane_.alt, "one run of each setting"


def test_a_line_with_losses_that_are_not_finite_is_drawn_without_them(analysis: SweepAnalysis) -> None:
    broken = line("update", 1.0)
    broken["losses"][0], broken["losses"][4] = "nan", "inf"
    one = analysis.adapters[0].model_copy(update={"landscapes": {"update": broken}})
    (drawn,) = (
        f for f in analysis_figures(analysis.model_copy(update={"adapters": (one,)})) if "line" in f.key
    )
    assert drawn.alt == "Lowest loss on the line: a-s0 1.00 at +0.00."


def test_a_plane_with_losses_that_are_not_finite_is_drawn(analysis: SweepAnalysis) -> None:
    broken = plane("random", 1.0)
    broken["losses"][0], broken["losses"][1] = "nan", "inf"
    one = analysis.adapters[0].model_copy(update={"landscapes": {"random": broken}})
    drawn = analysis_figures(analysis.model_copy(update={"adapters": (one,), "predictors": (), "angles": {}}))
    assert [figure.key for figure in drawn] == ["spectra", "intruders", "intruders-all", "landscape-random"]


def test_typical_adapters_are_drawn_first_and_one_of_each_setting(analysis: SweepAnalysis) -> None:
    (spectra,) = (one for one in analysis_figures(analysis, ["c-s1", "gone"]) if one.key == "spectra")
    assert spectra.alt.index("c-s1") < spectra.alt.index("a-s0") < spectra.alt.index("b-s0")
    assert "c-s0" not in spectra.alt, "one run of each setting"


def test_a_figure_with_many_curves_is_higher(analysis: SweepAnalysis) -> None:
    one = analysis.adapters[0]
    kept = {kind: one.landscapes[kind] for kind in ("random", "line")}
    one = one.model_copy(update={"landscapes": kept})
    many = [one.model_copy(update={"name": f"n{i}", "group": f"g{i}"}) for i in range(20)]
    more = analysis.model_copy(update={"adapters": tuple(many)})
    few = {drawing.key: drawing for drawing in analysis_figures(analysis)}
    drawn = {d.key: d for d in analysis_figures(more, [f"n{i}" for i in range(14, 0, -1)])}
    assert all(f">n{i}<" in drawn["landscape-random"].svg for i in range(3, 15)), "a panel for each"
    for key in ("spectra", "intruders", "line-line"):
        assert drawn[key].svg.count("<title>n") == 12
        assert height(drawn[key].svg) > height(few[key].svg)
    assert [name in drawn["spectra"].alt for name in ("n14", "n3 ", "n2 ")] == [True, True, False]
    plain = {d.key: d for d in analysis_figures(more)}
    assert plain["spectra"].svg.count("<title>n") == 7, "more colours can't be told apart"


def height(svg: str) -> float:
    (found,) = re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)
    return float(found)

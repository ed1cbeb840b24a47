"""The analysis on the page, from numbers that could have been found."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from rayft.analysis.landscape import Landscape
from rayft.analysis.predict import Run, correlations
from rayft.analysis.record import (
    AdapterAnalysis,
    Gap,
    Intruders,
    Predictor,
    SweepAnalysis,
)
from rayft.analysis.section import AnalyzeConfig
from rayft.report.analysis import analysis_figures, chosen_words, gap_rows, predictor_rows, predictor_words
from rayft.report.render import html
from rayft.report.terminal import analysis_tables
from tests.unit.report.example import example
from tests.unit.report.test_render import Page


def plane(kind: str, steep: float) -> dict[str, Any]:
    axis = np.linspace(-1, 1, 7)
    points = tuple((float(x), float(y)) for x in axis for y in axis)
    losses = tuple(1.0 + steep * (x * x + 0.3 * y * y) for x, y in points)
    path = ((1.0, 0.5), (0.4, 0.1), (0.0, 0.0)) if kind == "trajectory" else ()
    return Landscape(kind, "update" if not path else None, points, losses, 0, 50, path, (0.8, 0.1)).to_json()  # type: ignore[arg-type]


def line(kind: str, steep: float) -> dict[str, Any]:
    axis = [float(x) for x in np.linspace(-1, 1, 5)]
    losses = tuple(1.0 + steep * x * x for x in axis)
    norm = "update" if kind == "random" else None
    return Landscape(kind, norm, tuple((x,) for x in axis), losses, 0, 50).to_json()  # type: ignore[arg-type]


def adapter(name: str, group: str, gap: float, norm: float) -> AdapterAnalysis:
    epsilons = (0.3, 0.5, 0.7)
    return AdapterAnalysis(
        name=name,
        group=group,
        measures={"update_norm": norm, "sam_sharpness": 0.01 * norm, "effective_rank_mean": 3.3},
        gap=Gap(train=1.0, held_out=1.0 + gap, low=gap - 0.1, high=gap + 0.1, n=40),
        median_spectrum=(1.0, 0.5, 0.1, 0.02),
        intruders=Intruders(
            epsilons=epsilons,
            counts=(0, 1.5, 4),
            baseline=(0, 6, 10),
            top=10,
            modules=("q", "v"),
            shares=(0, 0.1, 0.3),
        ),
        landscapes={
            "random": plane("random", norm),
            "trajectory": plane("trajectory", norm),
            "line": line("random", norm),
            "update": line("update", norm),
        },
        notes={"hessian": "curvlinops <is> missing"} if name == "a-s1" else {},
    )


def predictor(measure: str, rho: float, half: float) -> Predictor:
    return Predictor(
        measure=measure, kendall=0.8 * rho, kendall_low=0.8 * rho - half, kendall_high=0.8 * rho + half,
        spearman=rho, spearman_low=rho - half, spearman_high=rho + half, n=6, groups=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def analysis() -> SweepAnalysis:
    adapters = [
        adapter(f"{g}-s{s}", g, 0.1 * i + 0.02 * s, 1.0 + i) for i, g in enumerate("abc") for s in (0, 1)
    ]
    return SweepAnalysis(
        config=AnalyzeConfig(parts=("gap", "spectra")),
        adapters=tuple(adapters),
        predictors=(predictor("update_norm", 0.9, 0.2), predictor("bound_information_log10", -0.1, 0.7)),
        angles={"a-s0 / b-s0": (0.1, 0.9), "a-s0 / c-s0": (0.2, 1.2), "b-s0 / c-s0": (0.5, 1.5)},
    )


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
    assert all(drawn[key].endswith("Nowhere finite: a-s0.") for key in planes)
    assert [row.train for row in gap_rows(found)][-broken:] == ["diverged"] * broken
    assert ("Nowhere finite" in html(example(), found)) == (broken == 1)


def test_the_predictor_that_is_drawn_is_not_one_of_few_runs(analysis: SweepAnalysis) -> None:
    gaps = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

    def drawn(count: int, **measures: tuple[float, ...]) -> str:
        """Draw what is found of so many runs, of as many settings; a measure that ends early has fewer."""
        runs = [
            Run(str(i), gaps[i], {name: values[i] for name, values in measures.items() if i < len(values)})
            for i in range(count)
        ]
        found = analysis.model_copy(update={"predictors": tuple(correlations(runs))})
        return next(one.alt for one in analysis_figures(found) if one.key == "gaps")

    few, strong = (3.0, 2.0, 1.0), (5.0, 4.0, 3.0, 1.0, 2.0)
    weak = (1.0, 3.0, 2.0, 4.0, 6.0, 5.0)
    assert "‖ΔW‖" in drawn(
        5, sam_sharpness=few, effective_rank_mean=(1.0, 3.0, 2.0, 5.0, 4.0), update_norm=strong
    )
    # Of six settings there is an interval.
    assert "effective rank" in drawn(6, sam_sharpness=few, update_norm=strong, effective_rank_mean=weak)


def test_a_whole_models_spectrum_stands_beside_an_adapters(analysis: SweepAnalysis) -> None:
    def drawn(length: int) -> str:
        long = adapter("whole-s0", "whole", 0.1, 2.0).model_copy(
            update={"median_spectrum": tuple(0.99**i for i in range(length))}
        )
        both = analysis.model_copy(update={"adapters": (long, *analysis.adapters)})
        return next(one.svg for one in analysis_figures(both) if one.key == "spectra")

    few, many = drawn(16), drawn(17 * 32)
    # Markers are references to one shape: about as many for 544 values as for 16 times fewer.
    assert many.count("<use") < few.count("<use") + 2 * 32
    ticks = [set(re.findall(r">([\d.]+)</text>", page)) for page in (few, many)]
    assert {"1", "10", "100"} <= ticks[1]
    assert not {"10", "100"} <= ticks[0]


def test_what_a_measure_is_worth_beyond_the_training_loss_is_told(analysis: SweepAnalysis) -> None:
    def with_more(one: Predictor, partial: float, held_out: float) -> Predictor:
        known = {"partial": partial, "held_out": held_out}
        ends = {f"{name}_{end}": value + step for name, value in known.items()
                for end, step in (("low", -0.2), ("high", 0.2))}  # fmt: skip
        return one.model_copy(update=known | ends)

    first, second = analysis.predictors
    chosen = (with_more(first, 0.1, math.nan), with_more(second, 0.6, -0.5))
    assert not chosen_words(analysis)
    told = analysis.model_copy(update={"chosen": chosen})
    assert chosen_words(told).endswith(
        "; at equal training loss: information bound (log10); with the held-out loss itself: information "
        "bound (log10)."
    )
    rows = predictor_rows(chosen)
    assert [(row.partial, row.held_out) for row in rows] == [
        ("+0.10 [−0.10, +0.30]", "–"), ("+0.60 [+0.40, +0.80]", "−0.50 [−0.70, −0.30]"),
    ]  # fmt: skip
    (_, table) = analysis_tables(told)
    assert str(table.title).endswith(f"Each method at its best setting. {chosen_words(told)}")
    page = html(example(), told)
    for wanted in ("Each method at its best setting", "−0.50 [−0.70, −0.30]", "ρ at equal training loss"):
        assert wanted in page
    assert "Each method at its best setting" not in html(example(), analysis)
    many = [with_more(predictor(f"measure_{n}", 0.9, 0.1), 0.1, 0.1) for n in range(6)]
    words = predictor_words(analysis.model_copy(update={"predictors": tuple(many)}))
    assert "measure 3, and 2 more (of 6" in words
    assert words.endswith("at equal training loss: none; with the held-out loss itself: none.")


def test_what_tells_is_told_and_with_how_many_tries(analysis: SweepAnalysis) -> None:
    words = predictor_words(analysis)
    assert words.startswith(
        "Over 6 runs of 3 settings these go with the gap: ‖ΔW‖ of all modules (of 2 measures"
    )
    assert words.endswith("about 1 would by chance).")
    none = analysis.model_copy(update={"predictors": analysis.predictors[1:]})
    assert (
        predictor_words(none)
        == "None of 1 measures was seen to predict the generalisation gap over 6 runs of 3 settings."
    )
    flat = [one.model_copy(update={"gap": Gap(train=1.0, held_out=1.1, low=-0.1, high=0.3, n=40)})
            for one in analysis.adapters]  # fmt: skip
    noise = predictor_words(analysis.model_copy(update={"adapters": tuple(flat)}))
    assert noise.startswith("Of 6 gaps none can be told from 0: what correlates here correlates mostly with")
    assert noise.endswith(words)
    empty = analysis.model_copy(update={"predictors": (), "note": "a correlation needs 3 finished runs"})
    assert predictor_words(empty) == "a correlation needs 3 finished runs"
    assert [row.tells for row in predictor_rows(analysis.predictors)] == [True, False]
    few = analysis.model_copy(update={"predictors": (predictor("update_norm", 1.0, math.nan),)})
    assert "no interval can be given, which takes six settings" in predictor_words(few)
    assert [(row.tells, row.spearman) for row in predictor_rows(few.predictors)] == [(False, "+1.00")]


def test_the_page_has_it_all_and_stays_whole(analysis: SweepAnalysis) -> None:
    page = Page(html(example(), analysis))
    assert page.open == []
    assert page.outside == []
    assert len(page.ids) == len(set(page.ids))
    for wanted in ("Generalisation", "‖ΔW‖ of all modules", "+0.90 [+0.70, +1.10]", "curvlinops <is> missing",
                   "Loss landscapes", "Intruder dimensions", "c-s1"):  # fmt: skip
        assert wanted in page.text
    assert "Generalisation" not in Page(html(example())).text


def test_figures_are_drawn_with_words_and_fit_a_phone(analysis: SweepAnalysis) -> None:
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


def test_a_line_with_losses_that_are_not_finite(analysis: SweepAnalysis) -> None:
    broken = line("update", 1.0)
    broken["losses"][0], broken["losses"][4] = "nan", "inf"
    one = analysis.adapters[0].model_copy(update={"landscapes": {"update": broken}})
    (drawn,) = (
        f for f in analysis_figures(analysis.model_copy(update={"adapters": (one,)})) if "line" in f.key
    )
    assert drawn.alt == "Lowest loss on the line: a-s0 1.00 at +0.00."


def test_landscapes_with_nan_and_one_adapter(analysis: SweepAnalysis) -> None:
    broken = plane("random", 1.0)
    broken["losses"][0], broken["losses"][1] = "nan", "inf"
    one = analysis.adapters[0].model_copy(update={"landscapes": {"random": broken}})
    drawn = analysis_figures(analysis.model_copy(update={"adapters": (one,), "predictors": (), "angles": {}}))
    assert [figure.key for figure in drawn] == ["spectra", "intruders", "intruders-all", "landscape-random"]


def test_gaps_are_in_order_and_what_is_missing_is_a_dash(analysis: SweepAnalysis) -> None:
    bare = AdapterAnalysis(name="bare", notes={"gap": "why"})
    rows = gap_rows(analysis.model_copy(update={"adapters": (bare, *analysis.adapters)}))
    assert [row.name for row in rows] == ["a-s0", "a-s1", "b-s0", "b-s1", "c-s0", "c-s1", "bare"]
    assert rows[0].gap == "+0.000 [−0.100, +0.100]"
    assert (rows[-1].gap, rows[-1].norm) == ("–", "–")
    notes = {"spectra": "no factors", "gap": "no data", "landscape": "no factors"}
    many = analysis.model_copy(update={"adapters": (bare.model_copy(update={"notes": notes}),)})
    assert gap_rows(many)[0].missing == {"spectra, landscape": "no factors", "gap": "no data"}


def test_it_is_kept_with_infinities(analysis: SweepAnalysis, tmp_path: Any) -> None:
    odd = analysis.adapters[0].model_copy(update={"measures": {"bound": math.inf, "zero": -math.inf}})
    kept = analysis.model_copy(update={"adapters": (odd,)})
    kept.save(tmp_path)
    found = SweepAnalysis.find(tmp_path)
    assert found
    assert found.adapters[0].measures == {"bound": math.inf, "zero": -math.inf}
    assert found.model_dump_json() == kept.model_dump_json()
    assert SweepAnalysis.find(tmp_path / "nowhere") is None


def test_the_terminal_shows_both_tables(analysis: SweepAnalysis) -> None:
    gaps, predictors = analysis_tables(analysis)
    assert gaps.row_count == 6
    assert predictors.row_count == 2
    assert len(analysis_tables(analysis.model_copy(update={"predictors": ()}))) == 1


def test_curves_are_of_the_typical_adapters_first(analysis: SweepAnalysis) -> None:
    (spectra,) = (one for one in analysis_figures(analysis, ["c-s1", "gone"]) if one.key == "spectra")
    assert spectra.alt.index("c-s1") < spectra.alt.index("a-s0") < spectra.alt.index("b-s0")
    assert "c-s0" not in spectra.alt, "one run of each setting"


def test_many_curves_have_room_for_their_names(analysis: SweepAnalysis) -> None:
    one = analysis.adapters[0]
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


def test_a_zero_has_no_minus(analysis: SweepAnalysis) -> None:
    nearly = analysis.predictors[0].model_copy(update={"spearman": -0.001, "spearman_low": -0.2})
    rows = predictor_rows([nearly])
    assert rows[0].spearman.startswith("+0.00 [−0.20, ")

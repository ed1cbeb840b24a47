"""An analysis in words: sentences, and lines of tables on the page and in the terminal."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rayft.analysis.record import AdapterAnalysis, Gap, Predictor, SweepAnalysis
from rayft.report.analysis import bound_rows, chosen_words, gap_rows, predictor_rows, predictor_words
from rayft.report.render import html
from rayft.report.terminal import analysis_tables
from tests.unit.report.example import example, example_analysis, predictor
from tests.unit.report.test_render import Page, bare

__all__ = ["bare"]


@pytest.fixture(scope="module")
def analysis() -> SweepAnalysis:
    return example_analysis()


@pytest.mark.usefixtures("bare")
def test_what_a_measure_is_worth_beyond_the_training_loss_is_described(
    analysis: SweepAnalysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.report.render.analysis_figures", lambda *_: [])

    def with_more(one: Predictor, partial: float, held_out: float) -> Predictor:
        known = {"partial": partial, "held_out": held_out}
        ends = {f"{name}_{end}": value + step for name, value in known.items()
                for end, step in (("low", -0.2), ("high", 0.2))}  # fmt: skip
        return one.model_copy(update=known | ends)

    first, second = analysis.predictors
    chosen = (with_more(first, 0.1, math.nan), with_more(second, 0.6, -0.5))
    assert not chosen_words(analysis)
    shown = analysis.model_copy(update={"chosen": chosen})
    assert chosen_words(shown).endswith(
        "; at equal training loss: information bound (log10); with the held-out loss itself: information "
        "bound (log10)."
    )
    rows = predictor_rows(chosen)
    assert [(row.partial, row.held_out) for row in rows] == [
        ("+0.10 [−0.10, +0.30]", "–"), ("+0.60 [+0.40, +0.80]", "−0.50 [−0.70, −0.30]"),
    ]  # fmt: skip
    (_, table) = analysis_tables(shown)
    assert str(table.title).endswith(f"Each method at its best setting. {chosen_words(shown)}")
    page = html(example(), shown)
    for wanted in ("Each method at its best setting", "−0.50 [−0.70, −0.30]", "ρ at equal training loss"):
        assert wanted in page
    assert "Each method at its best setting" not in html(example(), analysis)
    many = [with_more(predictor(f"measure_{n}", 0.9, 0.1), 0.1, 0.1) for n in range(6)]
    words = predictor_words(analysis.model_copy(update={"predictors": tuple(many)}))
    assert "measure 3, and 2 more (of 6" in words
    assert words.endswith("at equal training loss: none; with the held-out loss itself: none.")


def test_measures_that_correlate_are_named_with_how_many_would_by_chance(analysis: SweepAnalysis) -> None:
    words = predictor_words(analysis)
    assert words.startswith(
        "Over 6 runs of 3 settings these measures correlate with the gap: ‖ΔW‖ of all modules (of 2 measures"
    )
    assert words.endswith("about 1 would by chance).")
    none = analysis.model_copy(update={"predictors": analysis.predictors[1:]})
    assert (
        predictor_words(none)
        == "Over 6 runs of 3 settings none of 1 measures was found to correlate with the gap."
    )
    flat = [one.model_copy(update={"gap": Gap(train=1.0, held_out=1.1, low=-0.1, high=0.3, n=40)})
            for one in analysis.adapters]  # fmt: skip
    noise = predictor_words(analysis.model_copy(update={"adapters": tuple(flat)}))
    assert noise.startswith("Of 6 gaps none can be told from 0, so the correlations here are mostly with")
    assert noise.endswith(words)
    empty = analysis.model_copy(update={"predictors": (), "note": "a correlation needs 3 finished runs"})
    assert predictor_words(empty) == "A correlation needs 3 finished runs."
    assert [row.correlates for row in predictor_rows(analysis.predictors)] == [True, False]
    few = analysis.model_copy(update={"predictors": (predictor("update_norm", 1.0, math.nan),)})
    assert "no interval can be computed, which takes six settings" in predictor_words(few)
    assert [(row.correlates, row.spearman) for row in predictor_rows(few.predictors)] == [(False, "+1.00")]


@pytest.mark.usefixtures("bare")
def test_the_page_shows_the_analysis_and_stays_whole(analysis: SweepAnalysis) -> None:
    page = Page(html(example(), analysis))
    assert page.open == []
    assert page.outside == []
    assert len(page.ids) == len(set(page.ids))
    for wanted in ("Generalisation", "‖ΔW‖ of all modules", "+0.90 [+0.70, +1.10]", "curvlinops <is> missing",
                   "Loss landscapes", "Intruder dimensions", "c-s1"):  # fmt: skip
        assert wanted in page.text
    assert "Generalisation" not in Page(html(example())).text


def test_gaps_are_sorted_and_missing_ones_are_dashes_at_the_end(analysis: SweepAnalysis) -> None:
    bare = AdapterAnalysis(name="bare", notes={"gap": "why"})
    rows = gap_rows(analysis.model_copy(update={"adapters": (bare, *analysis.adapters)}))
    assert [row.name for row in rows] == ["a-s0", "a-s1", "b-s0", "b-s1", "c-s0", "c-s1", "bare"]
    assert rows[0].gap == "+0.000 [−0.100, +0.100]"
    assert (rows[-1].gap, rows[-1].norm) == ("–", "–")
    notes = {"spectra": "no factors", "gap": "no data", "landscape": "no factors"}
    many = analysis.model_copy(update={"adapters": (bare.model_copy(update={"notes": notes}),)})
    assert gap_rows(many)[0].missing == {"spectra, landscape": "no factors", "gap": "no data"}


def test_a_measure_that_is_not_finite_is_named_so(analysis: SweepAnalysis) -> None:
    odd = analysis.adapters[0].model_copy(
        update={"measures": {"sam_sharpness": math.nan, "update_norm": 2.5}}
    )
    (row,) = gap_rows(analysis.model_copy(update={"adapters": (odd,)}))
    assert (row.sharpness, row.norm, row.effective_rank) == ("not finite", "2.5", "–")


@pytest.mark.usefixtures("bare")
def test_bounds_are_shown_and_vacuous_ones_marked(
    analysis: SweepAnalysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.report.render.analysis_figures", lambda *_: [])
    first, second, third = analysis.adapters[:3]
    logs = {"bound_information_log10": 2.5, "bound_norm_log10": -0.5, "bound_lipschitz_log10": 400.25}
    full = first.model_copy(
        update={
            "measures": {"parameters": 1536.0, **logs},
            "vacuous": ("bound_information", "bound_lipschitz"),
        }
    )
    zero = {"parameters": 2e6, "bound_information_log10": 3.5, "bound_lipschitz_log10": -math.inf}
    odd = second.model_copy(update={"measures": zero, "vacuous": ()})
    none = third.model_copy(update={"measures": {}})
    shown = analysis.model_copy(update={"adapters": (full, odd, none)})
    rows = [(row.numbers, row.information, row.norm, row.lipschitz) for row in bound_rows(shown)]
    assert rows == [
        ("1.54k", "316 vacuous", "0.316", "1.78e+400 vacuous"), ("2M", "3162", "–", "0"),
    ]  # fmt: skip
    page = html(example(), shown)
    assert "<td>316 vacuous</td>" in page
    assert f"range of the loss, {analysis.config.clip} nats" in page
    assert 'id="bounds"' not in html(example(), analysis.model_copy(update={"adapters": (none,)}))


def test_infinities_are_saved_and_read(analysis: SweepAnalysis, tmp_path: Any) -> None:
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


def test_a_rounded_zero_has_no_minus(analysis: SweepAnalysis) -> None:
    nearly = analysis.predictors[0].model_copy(update={"spearman": -0.001, "spearman_low": -0.2})
    rows = predictor_rows([nearly])
    assert rows[0].spearman.startswith("+0.00 [−0.20, ")

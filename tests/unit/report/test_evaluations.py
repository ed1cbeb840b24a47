"""Evaluations as a report shows them."""

import math
from pathlib import Path

from rayft.report import Score
from rayft.report.evaluations import (
    EvaluatedDifference,
    EvaluatedScore,
    SavedEvaluation,
    SavedEvaluations,
    evaluation_groups,
)

SCORE = Score(value=0.6, low=0.5, high=0.7, n=9)
NO_INTERVAL = Score(value=24.31, low=math.nan, high=math.nan, n=62)


def saved(date: str, **values: object) -> SavedEvaluation:
    rows = (
        EvaluatedScore(target="one", task="test", metric="number", score=SCORE, loss=0.5),
        EvaluatedScore(target="one", task="wikitext", metric="perplexity", score=NO_INTERVAL),
        EvaluatedScore(target="one", task="", metric="", loss=0.25),
    )
    both = EvaluatedDifference(
        target="one", against="base", task="test", metric="number", difference=SCORE, p_value=0.01234
    )
    return SavedEvaluation.model_validate(
        {"date": date, "base": "tiny", "scores": rows, "differences": (both,), **values}
    )


def test_what_was_saved_is_found_in_the_order_of_time(tmp_path: Path) -> None:
    late, early = saved("2026-02-01T00:00:00+00:00"), saved("2026-01-01T00:00:00+00:00")
    late.save(tmp_path, "a")
    early.save(tmp_path, "b")
    (tmp_path / "evaluations" / "c.json").write_text("[]")
    (tmp_path / "evaluations" / "notes.txt").write_text("mine")
    found = SavedEvaluations.find(tmp_path)
    assert [one.date for one in found.found] == [early.date, late.date]
    assert math.isnan(found.found[0].scores[1].score.low)  # type: ignore[union-attr]
    assert found.unreadable == ("evaluations/c.json",)
    assert SavedEvaluations.find(tmp_path / "nowhere") == SavedEvaluations()


def test_an_evaluation_is_shown_with_intervals_and_differences() -> None:
    one = saved("2026-01-01T10:11:12+00:00", data_digest="d", how={"first questions": "9"})
    (group,) = evaluation_groups(SavedEvaluations((one,)), "d")
    assert group.heading == "2026-01-01 10:11 · base tiny · first questions 9"
    assert group.scores == [
        ("one", "test, number", "0.60 [0.50, 0.70]", "9", "0.500"),
        ("one", "wikitext, perplexity", "24.31", "62", "–"),
        ("one", "–", "–", "–", "0.250"),
    ]
    assert group.differences == [("one", "base", "test, number", "+0.60 [+0.50, +0.70]", "0.0123")]
    (group,) = evaluation_groups(SavedEvaluations((one,)), "e")
    assert group.heading.endswith("on other data than the sweep's")
    (group,) = evaluation_groups(SavedEvaluations((saved("2026", base="http://a/v1"),)), "e")
    assert group.heading == "2026 · server http://a/v1"

from typing import Any

from rayft.report import Comparison, MethodScore, Score, SweepRecord, Winner
from rayft.report.text import difference_text, score_text
from rayft.report.verdict import methods_words, verdict
from tests.unit.report.example import example, score


def changed(**parts: Any) -> SweepRecord:
    return SweepRecord.model_validate({**example().model_dump(), **parts})


def test_the_first_sentence_says_what_to_ship_and_why() -> None:
    first = verdict(example())[0]
    assert first == (
        "Ship lora-r32@r8 (2.48 MB): the smallest whose validation score is within 0.02 of the best trial's."
    )


def test_a_paired_difference_is_given_rather_than_overlapping_intervals() -> None:
    assert "+0.39 [+0.32, +0.46], which excludes zero" in " ".join(verdict(example()))
    turned = Comparison(
        name="few shot", against="lora-r32@r8", difference=Score(value=0.1, low=-0.2, high=0.4, n=9)
    )
    text = " ".join(verdict(changed(comparisons=[turned])))
    assert "−0.10 [−0.40, +0.20], which does not exclude zero" in text


def test_a_difference_within_overlapping_intervals_may_be_chance() -> None:
    text = " ".join(verdict(changed(comparisons=[])))
    assert "that of few shot, 0.21 [0.16, 0.26]: the intervals do not overlap" in text
    assert (
        "Unsqueezed it scores 0.61 [0.55, 0.67]: the intervals overlap, so the difference may be chance"
        in text
    )


def test_trials_that_can_not_be_told_apart_are_named() -> None:
    text = " ".join(verdict(example()))
    assert (
        "not settled: on 256 questions lora_plus-r16, cla-r32, DoRA-r16 and 2 more can't be told apart from "
        "lora-r32, judging by their intervals." in text
    )
    with_each = [
        Comparison(name="lora-r32", against=trial.id, difference=Score(value=0.1, low=0.0, high=0.2, n=240))
        for trial in example().trials
    ]
    text = " ".join(verdict(changed(comparisons=with_each)))
    assert "told apart from lora-r32, question by question." in text
    alone = [trial.model_dump() for trial in example().trials if trial.id in ("lora-r32", "asym-r16")]
    text = " ".join(
        verdict(changed(trials=alone, squeezed=[], winner=Winner(trial="lora-r32", ship="lora-r32", why="w")))
    )
    assert "On the test part the other scored trial differs from lora-r32." in text


def test_a_trial_that_scores_higher_on_the_test_part_than_the_winner_is_named() -> None:
    text = " ".join(verdict(changed(winner=Winner(trial="cla-r32", ship="cla-r32", why="w"))))
    assert "lora-r32 even scores higher on the test part" in text


def test_what_is_squeezed_from_no_higher_rank_is_not_said_to_fall() -> None:
    assert "lora-r32 squeezed from rank 32 to 8: " in " ".join(verdict(example()))
    for rank in (None, 8):
        trials = [{**trial.model_dump(), "rank": rank} for trial in example().trials]
        assert "It is lora-r32 squeezed to rank 8: " in " ".join(verdict(changed(trials=trials)))


def test_failures_are_counted() -> None:
    assert verdict(example())[-1] == "1 of 10 trials failed; their reasons are below."


def test_without_a_winner_nothing_is_shipped_and_the_reason_given() -> None:
    assert verdict(changed(winner=None, no_winner="none is better than few shot")) == [
        "Ship no adapter: none is better than few shot."
    ]
    assert verdict(changed(winner=None)) == ["Ship no adapter: no trial has finished."]


def test_missing_baselines_and_test_scores_are_stated() -> None:
    assert "There is no baseline to compare with." in verdict(changed(baselines=[]))
    trials = [{**trial.model_dump(), "test": None} for trial in example().trials]
    text = " ".join(
        verdict(changed(trials=trials, winner=Winner(trial="lora-r32", ship="lora-r32", why="w")))
    )
    assert "It was not scored on the test part." in text


def test_scores_and_differences_are_formatted_with_their_intervals() -> None:
    assert score_text(None) == "–"
    assert score_text(score(0.5, 100)) == "0.50 [0.40, 0.60]"
    assert difference_text(Score(value=-0.1, low=-0.2, high=0.0, n=3)) == "−0.10 [−0.20, +0.00]"
    assert difference_text(Score(value=-0.001, low=-0.2, high=-0.004, n=3)) == "+0.00 [−0.20, +0.00]"


def against_lora(method: str, low: float, high: float) -> MethodScore:
    known: dict[str, Any] = {
        "settings": f"{method}-r8",
        "tried": 2,
        "trials": (f"{method}-r8-s0",),
        "val_loss": 0.5,
    }
    if method == "lora":
        return MethodScore(method=method, test=score(0.5), **known)
    difference = Score(value=(low + high) / 2, low=low, high=high, n=256)
    return MethodScore(method=method, test=score(0.5), against="lora", difference=difference, **known)


def test_methods_better_and_worse_than_the_one_compared_with_are_listed() -> None:
    lora, same = against_lora("lora", 0, 0), against_lora("cla", -0.1, 0.1)
    better, worse = against_lora("rac", 0.01, 0.1), against_lora("paca", -0.3, -0.2)
    assert methods_words(example()) == ""
    assert methods_words(changed(methods=[lora, same])) == (
        "cla can't be told apart from lora on the test part."
    )
    assert methods_words(changed(methods=[better, lora, same])) == (
        "Of 2 methods compared with lora on the test part, better: rac; worse: none."
    )
    assert "better: none; worse: paca." in methods_words(changed(methods=[lora, worse]))

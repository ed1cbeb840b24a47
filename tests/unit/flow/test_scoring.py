"""Scores are made once and kept, and what can't be scored leaves the others alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rayft.errors import TrainError
from rayft.flow.scoring import (
    STYLES,
    Measured,
    ScoreStore,
    check_some,
    marked,
    questions_text,
    score_all,
    score_sweep,
)  # fmt: skip
from rayft.flow.sweep.preflight import Plan
from rayft.squeeze.section import SqueezeConfig
from rayft.sweep.score import ScoreRequest
from rayft.sweep.search import Trial, earlier
from tests.unit.damages import DAMAGES, half
from tests.unit.flow.answers import ADAPTER, Lanes, adapter, request_of, trial_of

SCORES = {"val": [1.0, 0.0], "test": [0.5]}


def requests(plan: Plan, **changes: Any) -> dict[str, ScoreRequest]:
    run = plan.run.model_copy(update=changes)
    return {
        "base": ScoreRequest(run, ("val", "test"), expected=plan.identity),
        "trial": ScoreRequest(run, ("test",), str(trial_of(plan) / "adapter"), expected=plan.identity),
    }


def test_a_score_is_made_once(plan: Plan) -> None:
    said: list[str] = []
    lanes, store = Lanes(lambda _: SCORES), ScoreStore(plan.output / "scores", said.append)
    executor: Any = lanes
    first = score_all(executor, requests(plan), store)
    assert lanes.asked == ["base", "trial"]
    again = score_all(executor, requests(plan), store)
    assert {name: [*found.parts["test"]] for name, found in again.items()} == {
        name: [*found.parts["test"]] for name, found in first.items()
    }
    # How a trial is run changes no score; how answers are generated does.
    seldom = plan.run.evaluate.model_copy(update={"checkpoint_seconds": 1.0})
    score_all(executor, requests(plan, evaluate=seldom), store)
    assert lanes.asked == ["base", "trial"]
    longer = plan.run.evaluate.model_copy(update={"max_new_tokens": 3})
    score_all(executor, requests(plan, evaluate=longer), store)
    assert lanes.asked == ["base", "trial"] * 2
    adapter(1).save(trial_of(plan) / "adapter")
    score_all(executor, requests(plan, evaluate=longer), store)
    assert lanes.asked == [*["base", "trial"] * 2, "trial"]
    assert said == []
    for way in DAMAGES:
        del lanes.asked[:]
        way(plan.output / "scores" / "base.json")
        score_all(executor, requests(plan, evaluate=longer), store)
        assert lanes.asked == ["base"]
    assert len(said) == len(DAMAGES) - 1
    assert all(text.startswith("base is scored again: ") for text in said)


def test_what_cannot_be_scored_leaves_the_other_scores_alone(plan: Plan) -> None:
    executor: Any = Lanes(lambda name: "its lane died" if name == "base" else SCORES)
    store = ScoreStore(plan.output / "scores", lambda _: None)
    found = score_all(executor, requests(plan), store)
    assert found["base"] == Measured(error="its lane died")
    assert found["trial"].parts == {"val": [1.0, 0.0], "test": [0.5]}
    check_some(found)
    half(trial_of(plan) / "adapter" / ADAPTER[1])
    found = score_all(executor, requests(plan), store)
    assert "is truncated or damaged" in found["trial"].error
    assert executor.asked == ["base", "trial", "base"]
    with pytest.raises(TrainError, match="base can't be scored: its lane died"):
        check_some(found)
    left = earlier(request_of(plan))
    assert left is not None
    (one,) = marked([Trial(plan.points[0], left.result, "r")], {plan.points[0].name: found["trial"]})
    assert one.status == "failed"
    assert one.error.startswith("can't be scored: ")


def test_the_sentence_before_a_sweep_counts_all_that_will_be_scored(plan: Plan) -> None:
    few = plan.run.evaluate.model_copy(update={"base_examples": 1})
    plan = replace(plan, run=plan.run.model_copy(update={"evaluate": few}))
    both, base = (
        len(plan.parts.val) + len(plan.parts.test),
        "2 for the base in 3 ways (evaluate.base_examples)",
    )

    def said(points: int, **squeeze: Any) -> str:
        config = plan.config.model_copy(update={"squeeze": SqueezeConfig(**squeeze)})
        return questions_text(replace(plan, config=config, points=[plan.points[0]] * points))

    start = f"to be scored after the search: {both} examples for each trial that can win"
    assert said(1, ranks=()) == f"{start}, and {base}"
    others = f", {len(plan.parts.test)} for each other trial, and {base}"
    assert said(3, ranks=()) == start + others
    assert said(3, ranks=(2, 1), energy=0.9) == f"{start} and each of up to 3 squeezed adapters{others}"
    further = said(3, ranks=(2, 1), winners=5, cont={"steps": 2})
    assert further == f"{start} and each of up to 12 squeezed adapters{others}"


def test_the_base_answers_a_sample_of_long_parts(plan: Plan) -> None:
    asked: dict[str, ScoreRequest] = {}

    class Recording(Lanes):
        def run(self, jobs: Any) -> Any:
            asked.update({job.id: job.request for job in jobs})
            return super().run(jobs)

    executor: Any = Recording(lambda _: SCORES)
    store = ScoreStore(plan.output / "scores", lambda _: None)
    left = earlier(request_of(plan))
    assert left is not None
    trials = [Trial(plan.points[0], left.result, "r")]
    score_sweep(plan, executor, trials, trials, store)
    base = [request for request in asked.values() if request.adapter is None]
    assert [request.examples for request in base] == [None] * 3
    assert asked.keys() - STYLES.keys() == {plan.points[0].name}
    asked.clear()
    few = plan.run.evaluate.model_copy(update={"base_examples": 1})
    sampled = replace(plan, run=plan.run.model_copy(update={"evaluate": few}))
    said: list[str] = []
    found, scores = score_sweep(sampled, executor, trials, trials, store, said.append)
    assert [request.examples for request in asked.values()] == [1] * 3
    assert scores[plan.points[0].name].parts.keys() == {"val", "test"}
    assert said == ["the base answers 2 questions, asked in 3 ways"]
    score_sweep(sampled, executor, trials, trials, store, said.append)
    assert len(said) == 1, "kept answers are not given again"
    # The majority answer costs nothing.
    assert len(found["majority answer"].parts["test"]) == 2

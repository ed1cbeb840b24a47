"""The scores of answers, by reasoning-gym and by exact match."""

from __future__ import annotations

import pickle

from rayft.data.example import Example, Message
from rayft.data.source import Scorer, read
from tests.unit.data.small_data import task


def test_strict_scores_only_fully_right_answers():
    parts = read(task("chain_sum"))
    example = parts.test[0]
    partial = f"The answer is {example.answer}, I think"
    native = Scorer("chain_sum", parts.scorer.params, strict=False)
    assert 0 < native.score(example, partial) < 1
    assert parts.scorer.score(example, partial) == 0
    assert parts.scorer.score(example, f" {example.answer}\n") == 1
    assert native.score(example, example.answer) == 1


def test_an_answer_for_which_the_scorer_raises_scores_zero_and_is_counted(monkeypatch):
    class Raising:
        def score_answer(self, answer, entry):
            raise ZeroDivisionError

    monkeypatch.setattr("rayft.data.scorer.build_task", lambda *_, **__: Raising())
    scorer = Scorer("chain_sum")
    assert [scorer.score(Example(entry={"answer": "1"}), text) for text in ("1", "2")] == [0.0, 0.0]
    assert scorer.failures == 2


def test_a_used_scorer_can_be_pickled():
    parts = read(task("needle_haystack"))
    assert parts.scorer.score(parts.test[0], parts.test[0].answer) == 1
    pickled = pickle.dumps(parts.scorer)
    assert pickled == pickle.dumps(read(task("needle_haystack")).scorer), "without the data set"
    copy = pickle.loads(pickled)  # noqa: S301  (its own bytes)
    assert copy.score(parts.test[0], parts.test[0].answer) == 1


def test_answers_to_questions_of_files_are_scored_by_exact_match():
    example = Example(messages=(Message("user", "?"), Message("assistant", "Straße")))
    scorer = Scorer()
    assert [scorer.score(example, text) for text in (" STRASSE\n", "Strasse!", "")] == [1.0, 0.0, 0.0]

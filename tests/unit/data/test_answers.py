"""The ways to compare an answer with the right one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from rayft.data.answers import ANSWER_SCORES, last_number
from rayft.data.section import ScorerConfig
from rayft.numerics import assert_close


def scored(kind: Any, answer: str, expected: str, **settings: Any) -> float:
    return ANSWER_SCORES[kind](answer, expected, ScorerConfig(kind=kind, **settings))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 42.", "42"),
        ("1,234,567.50 dollars", "1234567.50"),
        ("1, 2 and 3", "3"),
        ("1,2", "2"),
        ("1,2345", "2345"),
        ("-7", "-7"),
        ("it is −7", "-7"),
        ("10-5", "5"),
        ("x2 = +3e-2", "0.03"),
        ("half is .5", "0.5"),
        ("wait...5", "5"),
        ("\\boxed{12}", "12"),
        ("__9__", "9"),
        ("50%", "50"),
        ("1 000 m", "1000"),
        ("1e999999999", "1"),
        ("12 in room9", "12"),
    ],
)
def test_the_last_number_in_a_text(text: str, number: str) -> None:
    found = last_number(text)
    assert found is not None
    assert float(found) == float(number)


def test_a_text_without_numbers_has_none() -> None:
    assert [last_number(text) for text in ("", "none", "x2", "-", ".")] == [None] * 5


def test_numbers_are_equal_within_the_tolerance() -> None:
    assert scored("number", "The sum is $1,000.0", "1000") == 1
    assert scored("number", "0.30", "0.3") == 1
    assert scored("number", "99999999999999999999", "99999999999999999998") == 0
    assert scored("number", "3.15", "3.14", tolerance=0.01) == 1
    assert scored("number", "3.16", "3.14", tolerance=0.01) == 0
    # A right answer without a number is never met, not even by itself.
    assert scored("number", "none", "none") == 0


def test_contains_ignores_case_and_an_empty_answer_is_only_met_by_itself() -> None:
    assert scored("contains", "It is PARIS, I think", "Paris") == 1
    assert scored("contains", "Pari", "Paris") == 0
    assert scored("contains", "anything", "") == 0
    assert scored("contains", "", "") == 1


def test_a_regular_expression_compares_its_first_group() -> None:
    pattern = r"answer is (\w+)"
    assert scored("regex", "I think the answer is B. Or the answer is C", "B", pattern=pattern) == 1
    assert scored("regex", "the answer is b", "So the answer is B", pattern=pattern) == 1
    assert scored("regex", "B", "B", pattern=pattern) == 0
    assert scored("regex", "at 12:30", "12:30", pattern=r"\d+:\d+") == 1
    # A group that takes no part in the match is an empty text.
    assert scored("regex", "x", "", pattern="x|(y)") == 1


def test_f1_is_that_of_squad() -> None:
    assert scored("f1", "The cat!", "a cat") == 1
    assert scored("f1", "cat sat", "cat") == pytest.approx(2 / 3)
    assert scored("f1", "dog", "cat") == 0
    assert scored("f1", "cat cat", "cat") == pytest.approx(2 / 3)
    assert [scored("f1", answer, "the") for answer in ("", "a", "cat")] == [1, 1, 0]


WORDS = st.lists(st.sampled_from(["a", "b", "It's", "c3", "D", "-", "e_f"]), max_size=9).map(" ".join)


@given(WORDS, WORDS)
def test_rouge_l_is_that_of_rouge_score(answer: str, expected: str) -> None:
    theirs = RougeScorer(["rougeL"]).score(expected, answer)["rougeL"].fmeasure
    ours = scored("rouge_l", answer, expected)
    if answer.strip("- ") or expected.strip("- "):
        assert_close(torch.tensor([ours]), torch.tensor([theirs]), torch.float32, 3)
    else:
        # Two texts without words are equal; the package has 0.
        assert ours == 1


def test_rouge_l_counts_words_of_all_alphabets() -> None:
    assert scored("rouge_l", "кошка сидит", "Кошка спит") == 0.5


def test_json_is_compared_by_value() -> None:
    right = '{"a": [1, 2.50], "b": null}'
    assert scored("json", '{"b":null,"a":[1.0,2.5]}', right) == 1
    assert scored("json", 'Here:\n```json\n{"b": null, "a": [1, 2.5]}\n```', right) == 1
    for wrong in ('{"a": [true, 2.5], "b": null}', '{"a": [2.5, 1], "b": null}', '{"a": [1, 2.5]}', "{", ""):
        assert scored("json", wrong, right) == 0
    assert scored("json", "0", "false") == 0
    assert scored("json", "[" * 100_000, "[]") == 0

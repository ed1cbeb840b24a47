from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from rayft.data.example import Example
from rayft.data.template import IGNORED, Encoded, check_lengths
from rayft.data.texts import Shape, Texts, first_learnt, gather, lengths_of, notes
from rayft.errors import DataError


def conversation(prompt: int, answer: int) -> Encoded:
    tokens = tuple(range(100, 100 + prompt + answer))
    return Encoded(tokens, (IGNORED,) * prompt + tokens[prompt:])


def raw(size: int) -> Encoded:
    tokens = tuple(range(100, 100 + size))
    return Encoded(tokens, (IGNORED, *tokens[1:]))


def labelled(size: int) -> Encoded:
    return Encoded(tuple(range(100, 100 + size)), (IGNORED,) * size, label=1)


def fitted(
    texts: list[Encoded], limit: int, how: str, *, is_raw: bool = False, example: Sequence[int] | None = None
) -> Texts:
    number = np.array(example) if example else np.arange(len(texts)) * 2
    shape = Shape(lengths_of(texts), np.array([*map(first_learnt, texts)]), number, is_raw)
    examples = [Example(text=f"text {index}") for index in range(int(number.max()) + 1)]
    return Texts(texts, shape, limit, how, "train", examples)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["error", "drop", "cut"])
def test_texts_of_the_limit_stay_as_they_are(how):
    texts = [conversation(3, 5), conversation(1, 2)]
    found = fitted(texts, 8, how)
    assert [*found] == texts
    assert (found.note, found.lengths.tolist()) == ("", [8, 3])


def test_longer_texts_are_dropped():
    texts = [conversation(3, 5), conversation(2, 1), conversation(4, 5), conversation(1, 1)]
    found = fitted(texts, 7, "drop")
    assert [*found] == [texts[1], texts[3]]
    assert found.note == "train: dropped 2 of 4 examples with more than 7 tokens (the longest has 9)"
    assert found.lengths.tolist() == [3, 2]
    assert found[-1] == texts[3]
    assert found[0:9] == gather(found, [0, 1])


def test_notes_count_examples_and_not_the_texts_that_they_are_encoded_as():
    texts = [conversation(1, 5), conversation(2, 5), conversation(4, 6), conversation(1, 1)]
    for example, of in (([0, 0, 0, 1], "1 of 2"), ([0, 1, 1, 2], "2 of 3")):
        found = fitted(texts, 5, "drop", example=example)
        assert found.note == f"train: dropped {of} examples with more than 5 tokens (the longest has 10)"
    found = fitted(texts, 6, "drop", example=[0, 0, 0, 1])
    assert (
        found.note == "train: dropped answers of 1 of 2 examples with more than 6 tokens (the longest has 10)"
    )
    with pytest.raises(
        DataError, match=r"^1 of 2 examples are too long; the longest, train example 1 \('one'\), has 10"
    ):
        check_lengths(
            [6, 7, 10, 2], 6, None, "train", [Example(text="one"), Example(text="two")], [0, 0, 0, 1]
        )


def test_of_a_longer_conversation_the_end_is_left_with_the_whole_answer():
    texts = [conversation(6, 4), conversation(2, 2)]
    found = fitted(texts, 5, "cut")
    assert found[0].input_ids == texts[0].input_ids[-5:]
    assert found[0].labels == (IGNORED, *texts[0].labels[-4:])
    assert found[1] == texts[1]
    assert found.note == "train: cut 1 of 2 examples with more than 5 tokens (the longest had 10)"


@pytest.mark.parametrize("size", [5, 6])
def test_an_answer_is_never_cut(size):
    with pytest.raises(
        DataError, match=rf"train example 3 \('text 2'\): its answers have {size} tokens, so.*for 1 of 2 ex"
    ):
        fitted([conversation(9, 1), conversation(2, size)], 5, "cut")


def test_an_earlier_answer_is_not_cut_either():
    tokens = tuple(range(10))
    text = Encoded(tokens, (IGNORED, 1, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, 8, 9))
    with pytest.raises(DataError, match="answers have 3 tokens, and 9 with the turns between them, so they"):
        fitted([text], 6, "cut")


@pytest.mark.parametrize("size", [1, 4, 5, 9, 10, 11])
def test_longer_raw_text_is_divided_into_pieces(size):
    text = raw(size)
    found = fitted([raw(3), text, raw(2)], 5, "cut", is_raw=True)
    pieces = [*found][1:-1]
    # Of a last piece of one token nothing would be learnt.
    left = text.input_ids[: -1 if size > 5 and size % 5 == 1 else None]
    assert tuple(token for piece in pieces for token in piece.input_ids) == left
    assert all(len(piece) == 5 for piece in pieces[:-1])
    assert all(piece.labels == (IGNORED, *piece.input_ids[1:]) for piece in pieces)
    assert found.lengths.tolist() == [len(one) for one in found]


def test_a_longer_text_to_classify_keeps_its_start_and_its_last_token():
    (found,) = fitted([labelled(9)], 4, "cut")
    assert found == Encoded((100, 101, 102, 108), (IGNORED,) * 4, label=1)


def test_nothing_may_be_left():
    found = fitted([conversation(3, 3), conversation(5, 5)], 4, "drop")
    assert (len(found), [*found]) == (0, [])


def test_the_shape_of_the_first_examples():
    shape = Shape(np.array([3, 4, 5, 6]), np.zeros(4), np.array([0, 0, 1, 3]), raw=False)
    assert [shape.before(count).lengths.tolist() for count in (0, 1, 2, 3, 4, 9)] == [
        [], [3, 4], [3, 4, 5], [3, 4, 5], [3, 4, 5, 6], [3, 4, 5, 6],
    ]  # fmt: skip


def test_the_notes_are_those_of_the_parts_that_are_learnt_or_decide():
    long = fitted([conversation(3, 5), conversation(1, 1)], 4, "drop")
    assert notes({"train": long, "val": [raw(2)], "test": long}) == [long.note]

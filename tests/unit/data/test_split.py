"""Which rows are repeats, which part a question is put into, and how dropped rows are reported."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.data.example import Example, Message
from rayft.data.files import Table
from rayft.data.source import Parts, read
from rayft.data.split import split
from rayft.errors import DataError
from tests.unit.data.pictures import folder, noise, save
from tests.unit.data.small_data import config, keys, lines, pairs

SQUARES = [
    row
    for n in range(2, 12)
    for row in (
        {"prompt": f"What is {n}²?", "completion": str(n * n)},
        {"prompt": f"What is {n}2?", "completion": f"{n}2"},
    )
]


def answers(questions: int, each: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"question {question}", "completion": f"answer {answer}"}
        for question in range(questions)
        for answer in range(each)
    ]


def said(parts: Parts) -> Counter[tuple[str, str]]:
    examples = (*parts.train, *parts.val, *parts.test)
    return Counter((example.messages[0].content, example.answer) for example in examples)


def sizes(parts: Parts) -> tuple[int, int, int]:
    return len(parts.train), len(parts.val), len(parts.test)


def assert_apart(parts: Parts) -> None:
    found = keys(parts)
    assert len(set.union(*found)) == sum(map(len, found))


def test_questions_that_differ_in_a_superscript_are_different(tmp_path):
    parts = read(config(name=lines(tmp_path / "a.jsonl", SQUARES)))
    assert said(parts) == Counter((row["prompt"], row["completion"]) for row in SQUARES)
    assert sizes(parts) == (16, 2, 2)
    assert parts.dropped == ()


def test_blank_rows_of_raw_text_are_dropped(tmp_path):
    texts = [f"line {n}" for n in range(10)]
    rows = [{"text": text} for text in (texts[0], "", *texts[1:], " \n", None)]
    path = lines(tmp_path / "a.jsonl", rows)
    parts = read(config(name=path))
    assert {one.text for part in (parts.train, parts.val, parts.test) for one in part} == {*texts}
    assert [one.text for one in parts.dropped] == [
        f"{path}: dropped 3 of 13 rows that are blank (the first is line 2: '')"
    ]
    with pytest.raises(DataError, match=r"too little data: .* dropped 5 of 5 rows that are blank"):
        read(config(name=lines(tmp_path / "b.jsonl", [{"text": ""}] * 5)))
    with pytest.raises(DataError, match="line 1, column 'text': 3 is no text"):
        read(config(name=lines(tmp_path / "c.jsonl", [{"text": 3}])))
    with pytest.raises(DataError, match="line 2, column 'text': the text is empty; fill it or drop the row"):
        read(config(name=lines(tmp_path / "d.jsonl", [{"text": text, "label": 1} for text in ("a", "")])))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("10²", "102"),
        ("Polish", "polish"),
        ("if a:\n    b\nc", "if a:\n    b\n    c"),
        ("a b", "a  b"),
        ("a\tb", "a b"),
        ("a", "a "),
        ("a", "a\n"),
        ("ﬁ", "fi"),
        ("½", "1⁄2"),
        ("Ａ", "A"),
        ("straße", "strasse"),
        ("Ⅳ", "IV"),
        ("ª", "a"),
    ],
)
def test_questions_that_differ_in_any_character_are_different(tmp_path, one, other):
    rows = [{"prompt": text, "completion": "x"} for text in (one, other)]
    parts = read(config(name=lines(tmp_path / "a.jsonl", [*pairs(0, 8), *rows])))
    assert said(parts)[one, "x"] == said(parts)[other, "x"] == 1
    assert parts.dropped == ()
    assert Example(text=one).key != Example(text=other).key


def test_canonically_equivalent_questions_are_equal_and_both_rows_are_kept(tmp_path):
    rows = [
        {"prompt": f"caf{accent} {n}", "completion": "x"} for n in range(20) for accent in ("é", "e\u0301")
    ]
    parts = read(config(name=lines(tmp_path / "a.jsonl", rows)))
    assert sizes(parts) == (32, 4, 4)
    assert_apart(parts)
    assert parts.dropped == ()


def test_turns_differ_from_text_that_looks_like_turns():
    def conversation(*turns: str) -> Example:
        roles = ("user", "assistant")
        return Example(messages=tuple(Message(roles[n % 2], turn) for n, turn in enumerate(turns)))

    looks = [
        conversation("a", "b", "c", "d"),
        conversation("a\nassistant: b\nuser: c", "d"),
        conversation("a\x1fassistant\x1fb\x1fuser\x1fc", "d"),
        Example(messages=(Message("system", "a"), *conversation("c", "d").messages)),
    ]
    assert len({example.key for example in looks}) == len(looks)
    assert conversation("a", "b").key == conversation("a", "c").key


@pytest.mark.parametrize(
    ("questions", "each", "expected"), [(60, 2, (96, 12, 12)), (10, 4, (32, 4, 4)), (4, 10, (20, 10, 10))]
)
def test_several_answers_to_one_question_are_kept_and_in_one_part(tmp_path, questions, each, expected):
    rows = answers(questions, each)
    parts = read(config(name=lines(tmp_path / "a.jsonl", rows)))
    assert said(parts) == Counter((row["prompt"], row["completion"]) for row in rows)
    assert sizes(parts) == expected
    assert_apart(parts)
    assert parts.dropped == ()
    turned = read(config(name=lines(tmp_path / "b.jsonl", rows[::-1])))
    assert turned.digest == parts.digest


def test_a_configured_size_is_exact(tmp_path):
    path = lines(tmp_path / "a.jsonl", answers(60, 2))
    parts = read(config(name=path, test=5, val=6, train=70))
    assert sizes(parts) == (70, 6, 5)
    assert_apart(parts)
    (cut,) = parts.dropped
    assert cut.rows == 1
    assert cut.text.startswith(
        f"{path}: dropped 1 of 120 rows whose question is in test, which has the 5 that it should have "
        "(the first is line "
    )
    # A question with one answer fills what is left, so that nothing is cut.
    single = lines(tmp_path / "b.jsonl", [*answers(60, 2), *pairs(100, 101)])
    parts = read(config(name=single, test=5, val=6))
    assert sizes(parts) == (110, 6, 5)
    assert parts.dropped == ()


def test_a_question_is_never_divided(tmp_path):
    with pytest.raises(
        DataError, match=r"val should have 1 examples and gets 0 of 30 .* of a question are in"
    ):
        read(config(name=lines(tmp_path / "a.jsonl", answers(1, 30))))
    with pytest.raises(DataError, match="train should have 50 examples and gets 40 of 60"):
        read(config(name=lines(tmp_path / "b.jsonl", answers(6, 10)), train=50))


def test_only_equal_question_and_answer_are_a_repeat(tmp_path):
    rows = [
        *pairs(0, 40),
        {"prompt": "question 7", "completion": "another answer"},
        {"prompt": "QUESTION 8", "completion": "answer 8"},
        *pairs(7, 9),
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    parts = read(config(name=path))
    assert sum(sizes(parts)) == 42
    assert_apart(parts)
    (repeats,) = parts.dropped
    assert repeats.rows == 2
    assert repeats.text == (
        f"{path}: dropped 2 of 44 rows whose question and answer an earlier one has (the first is line 43: "
        "'question 7')"
    )


def test_the_quote_of_a_row_is_one_short_line(tmp_path):
    rows = [{"text": "[red]\n\x1b[2J\u202e" + "long " * 40}] * 2
    path = lines(tmp_path / "a.jsonl", [*rows, *({"text": f"text {n}"} for n in range(20))])
    (repeats,) = read(config(name=path)).dropped
    assert repeats.text == (
        f"{path}: dropped 1 of 22 rows whose text an earlier one has (the first is line 2: "
        r"'[red]\n\x1b[2J\u202elong long long long long long long long long l...')"
    )


def test_the_reason_for_each_dropped_row_is_reported(tmp_path):
    files = {
        "train": lines(tmp_path / "train.jsonl", [*pairs(0, 30), *pairs(0, 3)]),
        "val": lines(tmp_path / "val.jsonl", pairs(20, 35)),
        "test": lines(tmp_path / "test.jsonl", [*pairs(25, 40), *pairs(39, 40)]),
    }
    parts = read(config(files=files))
    asked = [
        {int(example.messages[0].content.split()[1]) for example in part}
        for part in (parts.train, parts.val, parts.test)
    ]
    assert asked == [set(range(20)), set(range(20, 25)), set(range(25, 40))]
    repeat = "whose question and answer an earlier one has (the first is line"
    assert [(item.rows, item.text.rpartition("/")[2]) for item in parts.dropped] == [
        (1, f"test.jsonl: dropped 1 of 16 rows {repeat} 16: 'question 39')"),
        (10, f"val.jsonl: dropped 10 of 15 rows {asks('test')} 6: 'question 25')"),
        (3, f"train.jsonl: dropped 3 of 33 rows {repeat} 31: 'question 0')"),
        (5, f"train.jsonl: dropped 5 of 33 rows {asks('test')} 26: 'question 25')"),
        (5, f"train.jsonl: dropped 5 of 33 rows {asks('val')} 21: 'question 20')"),
    ]


def asks(part: str) -> str:
    return f"whose question is in {part} (the first is line"


def test_one_large_question_leaves_the_small_ones_to_test_and_val(tmp_path):
    for seed in range(10):
        path = lines(tmp_path / "a.jsonl", [*answers(1, 20), *pairs(1, 3)])
        assert sizes(read(config(name=path, seed=seed))) == (20, 1, 1)


def test_unused_rows_of_a_file_drop_no_rows_of_the_others(tmp_path):
    path = lines(tmp_path / "a.jsonl", pairs(0, 50))
    parts = read(config(files={"train": path, "test": path}, test=10, val=5))
    assert sizes(parts) == (35, 5, 10)
    assert_apart(parts)
    with pytest.raises(DataError, match=r"gets 0 of 0 .*dropped 50 of 50 rows whose question is in test"):
        read(config(files={"train": path, "test": path}))


def test_questions_of_test_may_have_several_answers(tmp_path):
    files = {
        "train": lines(tmp_path / "a.jsonl", pairs(50, 90)),
        "test": lines(tmp_path / "b.jsonl", answers(5, 3)),
    }
    assert sizes(read(config(files=files))) == (36, 4, 15)


def chat(*turns: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)
        ]
    }


def test_all_questions_of_a_conversation_are_in_its_part(tmp_path):
    longer = [chat(f"question {n}", "yes", "why?", "so") for n in range(20)]
    files = {
        "train": lines(tmp_path / "a.jsonl", longer),
        "test": lines(tmp_path / "b.jsonl", [chat("question 3", "no")]),
    }
    parts = read(config(files=files))
    assert sizes(parts) == (17, 2, 1)
    assert [item.rows for item in parts.dropped] == [1]
    both = read(
        config(name=lines(tmp_path / "c.jsonl", longer + [chat(f"question {n}", "no") for n in range(20)]))
    )
    assert sizes(both) == (32, 4, 4)
    first = [{e.messages[0].content for e in part} for part in (both.train, both.val, both.test)]
    assert len(set.union(*first)) == sum(map(len, first)) == 20


def test_a_turn_that_is_not_learnt_is_not_a_question_of_the_conversation(tmp_path):
    longer = [chat(f"question {n}", "yes", "why?", "so") for n in range(20)]
    for row in longer:
        row["messages"][1]["weight"] = 0
    files = {
        "train": lines(tmp_path / "a.jsonl", longer),
        "test": lines(tmp_path / "b.jsonl", [chat("question 3", "no")]),
    }
    assert read(config(files=files)).dropped == ()


def test_examples_with_other_tools_calls_or_masks_differ():
    plain = (Message("user", "a"), Message("assistant", "b"))
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    same = [
        Example(messages=plain),
        Example(messages=(plain[0], Message("assistant", "b", learn=False))),
        Example(messages=(plain[0], Message("assistant", "b", extras=call))),
    ]
    others = [
        Example(messages=plain, tools=({"name": "f"},)),
        Example(messages=plain, tools=({"name": "g"},)),
        Example(messages=(Message("user", "a", extras={"name": "x"}), plain[1])),
    ]
    assert len({example.key for example in same}) == 1
    assert len({example.key for example in (same[0], *others)}) == 4
    assert len({example.identity for example in (*same, *others)}) == 6


def test_a_text_with_two_classes_is_kept(tmp_path):
    rows = [{"text": f"text {n}", "label": label} for n in range(30) for label in "ab"]
    parts = read(config(name=lines(tmp_path / "a.jsonl", [*rows, rows[0]])))
    assert sizes(parts) == (48, 6, 6)
    assert_apart(parts)
    assert [item.text.partition("dropped ")[2] for item in parts.dropped] == [
        "1 of 61 rows whose text and class an earlier one has (the first is line 61: 'text 0')"
    ]


def test_an_image_with_two_classes_is_kept(tmp_path):
    root = folder(tmp_path / "pets", each=10)
    for place in ("cat/a.png", "dog/a.png", "dog/b.png"):
        save(root / place, noise("twice"))
    parts = read(config(source="image_folder", name=str(root)))
    assert sum(sizes(parts)) == 22
    assert_apart(parts)
    (repeats,) = parts.dropped
    assert repeats.text == (
        f"{root}: dropped 1 of 23 images whose file content and class an earlier one has (the first is "
        f"{root / 'dog' / 'b.png'})"
    )


def rows_of(questions: list[int]) -> list[Example]:
    """Return a row whose answer depends on its number, so that equal rows only come from equal numbers."""
    return [
        Example(messages=(Message("user", str(question)), Message("assistant", str(place))))
        for place, question in enumerate(questions)
    ]


@settings(max_examples=200)
@given(
    questions=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    test=st.none() | st.integers(1, 20),
    val=st.none() | st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_every_row_is_in_one_part_or_reported_as_dropped(questions, test, val, seed):
    table = Table(str(Path("a.jsonl")), ("prompt", "completion"), [{}] * len(questions))
    values = {name: size for name, size in (("test", test), ("val", val)) if size is not None}
    try:
        parts, dropped = split({"train": (table, rows_of(questions))}, config(name="a", seed=seed, **values))
    except DataError:
        # Without sizes there is a part for each of three questions.
        assert values or len(set(questions)) < 3
        return
    assert sum(map(len, parts.values())) + sum(item.rows for item in dropped) == len(questions)
    found = [{example.key for example in examples} for examples in parts.values()]
    assert len(set.union(*found)) == sum(map(len, found))
    for part, size in values.items():
        assert len(parts[part]) == size
    if not values:
        assert not dropped

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from rayft.config import parse
from rayft.data import gym, source
from rayft.data.example import Example, Message
from rayft.data.source import DataConfig, Parts, Scorer, majority_answer, read
from rayft.errors import ConfigError, DataError


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(start: int, stop: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(start, stop)
    ]


def config(**values: Any) -> DataConfig:
    return parse(DataConfig, {"source": "jsonl", **values})


def task(
    name: str, params: dict[str, Any] | None = None, sizes: tuple[int, int, int] = (30, 10, 10)
) -> DataConfig:
    train, val, test = sizes
    return parse(DataConfig, {"name": name, "params": params or {}, "train": train, "val": val, "test": test})


def keys(parts: Parts) -> list[set[str]]:
    return [{example.key for example in part} for part in (parts.train, parts.val, parts.test)]


# reasoning-gym


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("needle_haystack", {"min_num_statements": 3, "max_num_statements": 5}),
        ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
        ("number_format", {"max_num_candidates": 3}),
    ],
)
def test_parts_of_a_task_share_no_question_and_no_index(name, params):
    parts = read(task(name, params, (80, 20, 20)))
    found = keys(parts)
    assert [len(part) for part in found] == [80, 20, 20]
    assert len(set.union(*found)) == 120
    ranges = [
        {example.entry["metadata"]["source_index"] for example in part}
        for part in (parts.test, parts.val, parts.train)
    ]
    assert max(ranges[0]) < min(ranges[1]) <= max(ranges[1]) < min(ranges[2])


def test_repeated_questions_are_dropped_and_counted():
    parts = read(
        task("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, (80, 20, 20))
    )
    assert parts.dropped > 0


def test_a_task_that_is_too_small_says_how_many_questions_it_has():
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(
        DataError, match=r"'chain_sum' can't fill its parts .* = 420\): \d+ items hold only \d+ diff"
    ):
        read(task("chain_sum", small, (400, 10, 10)))


def test_reading_twice_gives_the_same_and_pickles():
    first, second = read(task("needle_haystack")), read(task("needle_haystack"))
    assert first == second
    assert first.digest == second.digest
    assert len(first.digest) == 16
    assert pickle.loads(pickle.dumps(first)) == first  # noqa: S301  (its own bytes)
    other = read(parse(DataConfig, {**task("needle_haystack").model_dump(exclude={"files"}), "seed": 1}))
    assert other.digest != first.digest


def test_more_train_leaves_val_and_test_as_they_were():
    few, many = read(task("needle_haystack")), read(task("needle_haystack", sizes=(60, 10, 10)))
    assert (few.test, few.val) == (many.test, many.val)


def test_reading_leaves_the_global_generators_alone():
    import random

    import numpy as np

    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    read(task("needle_haystack"))
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.parametrize(
    ("name", "params", "match"),
    [
        ("needle_haystak", {}, "no task 'needle_haystak'; did you mean 'needle_haystack'"),
        ("chain_sum", {"min_term": 2}, "no option 'min_term'; did you mean 'min_terms'"),
        (
            "chain_sum",
            {"min_terms": "two"},
            r"data.params.min_terms of the task 'chain_sum': .*integer \(got 'two'\)",
        ),
        ("chain_sum", {"min_terms": 0}, "'chain_sum' refuses data.params"),
        ("chain_sum", {"seed": 3}, "no option 'seed'"),
        ("rubiks_cube", {}, "has no reference answer"),
    ],
)
def test_wrong_tasks(name, params, match):
    with pytest.raises(DataError, match=match):
        read(task(name, params))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"source": "reasoning_gym", "name": "chain_sum"}, "no size of its own: give train, val, test"),
        ({"source": "reasoning_gym"}, "write a reasoning-gym task"),
        ({"source": "jsonl"}, "give one file as name, or a file for each part"),
        ({"source": "jsonl", "name": "a", "files": {"train": "b"}}, "not both"),
        ({"source": "csv", "name": "a.csv", "params": {"x": 1}}, "params are options of reasoning-gym tasks"),
        ({"source": "csv", "name": "a.csv", "score": "native"}, "native is for source: reasoning_gym"),
        ({"source": "hub"}, "write a hub id"),
        ({"source": "csv", "name": "a.csv", "train": 0}, "train: .*greater than or equal to 1"),
        (
            {"source": "csv", "name": "a.csv", "maxlength": 3},
            "unknown key 'maxlength'; did you mean 'max_length'",
        ),
        (
            {"source": "reasoning_gym", "name": "x", "format": "text", "train": 1, "val": 1, "test": 1},
            "format 'text' does not fit",
        ),
    ],
)
def test_wrong_configurations(values, match):
    with pytest.raises(ConfigError, match=match):
        parse(DataConfig, values)


# Scores


def test_strict_counts_only_what_is_fully_right():
    parts = read(task("chain_sum"))
    example = parts.test[0]
    partial = f"The answer is {example.answer}, I think"
    native = Scorer("chain_sum", parts.scorer.params, strict=False)
    assert 0 < native.score(example, partial) < 1
    assert parts.scorer.score(example, partial) == 0
    assert parts.scorer.score(example, f" {example.answer}\n") == 1
    assert native.score(example, example.answer) == 1


def test_a_scorer_that_raises_gives_zero_and_is_counted(monkeypatch):
    class Raising:
        def score_answer(self, answer, entry):
            raise ZeroDivisionError

    monkeypatch.setattr("rayft.data.scorer.build_task", lambda *_, **__: Raising())
    scorer = Scorer("chain_sum")
    assert [scorer.score(Example(entry={"answer": "1"}), text) for text in ("1", "2")] == [0.0, 0.0]
    assert scorer.failures == 2


def test_a_used_scorer_pickles():
    parts = read(task("needle_haystack"))
    assert parts.scorer.score(parts.test[0], parts.test[0].answer) == 1
    copy = pickle.loads(pickle.dumps(parts.scorer))  # noqa: S301  (its own bytes)
    assert copy._dataset is None
    assert copy.score(parts.test[0], parts.test[0].answer) == 1


def test_files_are_scored_by_exact_match():
    example = Example(messages=(Message("user", "?"), Message("assistant", "Straße")))
    scorer = Scorer()
    assert [scorer.score(example, text) for text in (" STRASSE\n", "Strasse!", "")] == [1.0, 0.0, 0.0]


def test_the_majority_answer_is_the_most_frequent_of_train(tmp_path):
    rows = [{"prompt": f"q{number}", "completion": "yes" if number % 3 else "no"} for number in range(60)]
    assert majority_answer(read(config(name=lines(tmp_path / "a.jsonl", rows)))) == "yes"


# Files


def test_one_file_is_split_by_the_seed_alone(tmp_path):
    rows = pairs(0, 100)
    parts = read(config(name=lines(tmp_path / "a.jsonl", rows)))
    assert [len(part) for part in keys(parts)] == [80, 10, 10]
    assert len(set.union(*keys(parts))) == 100
    turned = read(config(name=lines(tmp_path / "b.jsonl", rows[::-1])))
    assert turned.digest == parts.digest
    assert read(config(name=str(tmp_path / "a.jsonl"), seed=1)).digest != parts.digest
    fewer = read(config(name=str(tmp_path / "a.jsonl"), train=20, val=5, test=5))
    assert [len(part) for part in keys(fewer)] == [20, 5, 5]


def test_repeats_in_one_file_are_dropped_whatever_their_case_and_spacing(tmp_path):
    rows = [
        *pairs(0, 40),
        {"prompt": " Question  7 ", "completion": "x"},
        {"prompt": "QUESTION 8", "completion": "x"},
    ]
    parts = read(config(name=lines(tmp_path / "a.jsonl", rows)))
    assert parts.dropped == 2
    assert sum(len(part) for part in keys(parts)) == 40


def test_a_question_in_two_parts_stays_in_test_before_val_before_train(tmp_path):
    files = {
        "train": lines(tmp_path / "train.jsonl", pairs(0, 30)),
        "val": lines(tmp_path / "val.jsonl", pairs(20, 35)),
        "test": lines(tmp_path / "test.jsonl", pairs(25, 40)),
    }
    parts = read(config(files=files))
    asked = [
        {int(example.messages[0].content.split()[1]) for example in part}
        for part in (parts.train, parts.val, parts.test)
    ]
    assert asked == [set(range(20)), set(range(20, 25)), set(range(25, 40))]
    assert parts.dropped == 20


def test_a_part_without_a_file_is_split_off_train(tmp_path):
    files = {
        "train": lines(tmp_path / "a.jsonl", pairs(0, 50)),
        "test": lines(tmp_path / "b.jsonl", pairs(45, 60)),
    }
    parts = read(config(files=files))
    assert [len(part) for part in keys(parts)] == [41, 4, 15]
    assert len(set.union(*keys(parts))) == 60


def test_the_three_kinds_of_file_say_the_same(tmp_path):
    import datasets

    rows = [
        {"prompt": f'q {n}, "quoted"', "completion": answer}
        for n, answer in enumerate(["007", "NA", "2024-01-01", "true", "1e3"] * 6)
    ]
    lines(tmp_path / "a.jsonl", rows)
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    digests = {
        read(config(source=kind, name=str(tmp_path / f"a.{kind}"))).digest
        for kind in ("jsonl", "csv", "parquet")
    }
    assert len(digests) == 1
    train = read(config(source="csv", name=str(tmp_path / "a.csv"))).train
    assert {example.answer for example in train} <= {"007", "NA", "2024-01-01", "true", "1e3"}


def test_formats_are_told_by_their_columns(tmp_path):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    kinds = {
        "messages": [{"messages": [{**turns[0], "content": f"{n}"}, turns[1]]} for n in range(10)],
        "text": [{"text": f"text {n}"} for n in range(10)],
        "classification": [{"text": f"text {n}", "label": n % 2 * 10} for n in range(40)],
    }
    found = {kind: read(config(name=lines(tmp_path / f"{kind}.jsonl", rows))) for kind, rows in kinds.items()}
    assert found["messages"].train[0].answer == "!"
    assert found["text"].train[0].messages == ()
    classes = found["classification"]
    assert classes.labels == ("0", "10")
    assert all(example.answer == classes.labels[example.label] for example in classes.train)
    assert found["text"].train[0].label is None


def test_columns_may_be_called_otherwise(tmp_path):
    rows = [{"q": f"q{number}", "a": "x"} for number in range(10)]
    path = lines(tmp_path / "a.jsonl", rows)
    assert read(config(name=path, columns={"prompt": "q", "completion": "a"})).train[0].answer == "x"


GOOD = pairs(0, 5)


@pytest.mark.parametrize(
    ("rows", "form", "match"),
    [
        ([*GOOD, {"prompt": 3, "completion": "x"}], "auto", "line 6, column 'prompt': 3 is no text"),
        ([*GOOD, {"prompt": "x"}], "auto", "line 6, column 'completion': an empty cell is no text"),
        ([*GOOD, {"prompt": "x", "completion": " "}], "auto", "column 'completion': the completion is empty"),
        ([{"promt": "x", "completion": "y"}], "auto", "has the columns promt, completion, but needs one of"),
        (
            [{"promt": "x", "completion": "y"}],
            "prompt_completion",
            "no column 'prompt', .* data.columns.prompt .*; did you mean 'promt'",
        ),
        ([{"messages": "hello"}], "auto", "line 1, column 'messages': 'hello' is no list of"),
        ([{"messages": [{"role": "user"}]}], "auto", "message 1 is .*, not {role, content} texts"),
        ([{"messages": [{"role": "usr", "content": "x"}]}], "auto", "the role 'usr'; did you mean 'user'"),
        (
            [{"messages": [{"role": "user", "content": "x"}]}],
            "auto",
            "last message is from 'user', not from the ass",
        ),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "auto", "there is only the answer"),
        (
            [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}],
            "auto",
            "message 2: the answer is empty",
        ),
        ([{"text": "x", "label": 0.5}], "auto", "column 'label': 0.5 is no class"),
        (
            [{"text": f"x{n}", "label": 1} for n in range(9)],
            "auto",
            "all train examples are of one class, '1'",
        ),
        ([], "auto", "is empty"),
        (GOOD[:2], "auto", "too little data: train should have 1 examples and gets 0 of 2"),
        ([1, 2], "auto", "line 1 is no object"),
    ],
)
def test_wrong_rows_are_named(tmp_path, rows, form, match):
    with pytest.raises(DataError, match=match):
        read(config(name=lines(tmp_path / "a.jsonl", rows), format=form))


def test_classes_that_train_has_not_are_refused(tmp_path):
    train = lines(tmp_path / "a.jsonl", [{"text": f"x{n}", "label": "ab"[n % 2]} for n in range(20)])
    test = lines(tmp_path / "b.jsonl", [{"text": "y", "label": "c"}])
    with pytest.raises(DataError, match="test has classes that train has not: c"):
        read(config(files={"train": train, "test": test}))


def test_sizes_that_a_file_cannot_fill_are_refused(tmp_path):
    path = lines(tmp_path / "a.jsonl", pairs(0, 50))
    with pytest.raises(DataError, match="train should have 45 examples and gets 40 of 50 different ones"):
        read(config(name=path, train=45))
    with pytest.raises(DataError, match="test should have 60 examples and gets 50"):
        read(config(name=path, test=60))


@pytest.mark.parametrize(
    ("name", "kind", "content", "match"),
    [
        ("none.jsonl", "jsonl", None, "no file at .*none.jsonl; check data.name"),
        ("a.csv", "jsonl", "x", "is not called .jsonl or .ndjson or .json, which source: jsonl reads"),
        ("a.jsonl", "jsonl", '{"prompt": "x"}\n{"prompt": \n', "line 2 is not JSON"),
        ("a.csv", "csv", "prompt,completion\na,b,c\n", "line 2 has 3 fields and the header 2; put quotes"),
        ("a.csv", "csv", 'prompt,completion\n"a,b\n', "is not CSV"),
        ("a.csv", "csv", "prompt,completion\n", "is empty"),
        (
            "a.csv",
            "csv",
            "prompt,completion\na,b\nc,\n",
            "line 3, column 'completion': the completion is empty",
        ),
        ("a.parquet", "parquet", "no parquet", "is not a readable Parquet file"),
    ],
)
def test_wrong_files(tmp_path, name, kind, content, match):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=match):
        read(config(source=kind, name=str(tmp_path / name)))


def test_a_folder_and_a_file_of_bytes_are_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read(config(name=str(tmp_path)))
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\n\xff\xfe,b\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        read(config(source="csv", name=str(tmp_path / "a.csv")))


# The hub


def test_the_hub_out_of_reach_is_told_apart(monkeypatch):
    import datasets

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/set' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(
        DataError, match=r"hub can't be reached to load 'org/set' .*read the file with source: jsonl"
    ):
        read(config(source="hub", name="org/set:main"))

    def missing(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/set' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(DataError, match="no data set 'org/set' that can be read"):
        read(config(source="hub", name="org/set"))

    def unknown(*_: Any, **__: Any) -> None:
        raise ValueError("Unknown split \"tset\". Should be one of ['train'].")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(DataError, match="can't load split 'tset' of 'org/set' from the hub: Unknown split"):
        read(config(source="hub", name="org/set", files={"train": "tset"}))


def test_hub_splits_become_parts_and_class_numbers_names(monkeypatch):
    import datasets

    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"])
    )
    asked = []

    def load(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        rows = [{"text": f"{split} {n}", "label": n % 2} for n in range(20)]
        return datasets.Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    parts = read(config(source="hub", name="org/set:main", files={"train": "train", "test": "validation"}))
    assert asked == [("org/set", "main", "train"), ("org/set", "main", "validation")]
    assert parts.labels == ("bad", "good")
    assert {example.text.split()[0] for example in parts.test} == {"validation"}
    assert [len(part) for part in keys(parts)] == [18, 2, 20]


def test_examples_are_frozen_and_the_digest_sees_every_field():
    example = Example(messages=(Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.text = "c"
    others = [
        example,
        Example(messages=(Message("user", "a"), Message("assistant", "c"))),
        Example(messages=(Message("system", "a"), Message("assistant", "b"))),
        Example(text="a"),
        Example(text="a", label=0, label_name="b"),
    ]
    assert len({source.digest([[other]]) for other in others}) == len(others)
    assert source.digest([[example], []]) != source.digest([[], [example]])


def test_items_are_drawn_up_to_the_stated_multiple(monkeypatch):
    drawn = []

    class Constant:
        def __getitem__(self, index: int) -> dict[str, str]:
            drawn.append(index)
            return {"question": "always", "answer": "the same"}

    monkeypatch.setattr(gym, "build_task", lambda *_: Constant())
    with pytest.raises(DataError, match="108 items hold only 1 different questions"):
        gym.draw_parts("constant", {}, {"test": 1, "train": 1}, 0, "\n")
    assert drawn == list(range(108))

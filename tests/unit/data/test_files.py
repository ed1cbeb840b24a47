"""Files of each kind and format, and what is wrong with them."""

from __future__ import annotations

import csv

import pytest

from rayft.data.source import read
from rayft.errors import DataError
from tests.unit.data.small_data import config, lines, pairs


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
            "prompt,note,prompt\na,b,c\n",
            "line 1: the header has 'prompt' more than once; give",
        ),
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


def test_a_csv_field_may_be_long(tmp_path):
    long = "word " * 40_000 + "end"
    rows = "".join(f"{n} {long},x\n" for n in range(10))
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{rows}")
    limit = csv.field_size_limit()
    parts = read(config(source="csv", name=str(tmp_path / "a.csv")))
    assert all(example.messages[0].content.endswith(long) for example in parts.train)
    assert csv.field_size_limit() == limit
    (tmp_path / "a.csv").write_text('prompt,completion\n"a,b\n')
    with pytest.raises(DataError, match="is not CSV"):
        read(config(source="csv", name=str(tmp_path / "a.csv")))
    assert csv.field_size_limit() == limit


def test_a_folder_and_a_file_of_bytes_are_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read(config(name=str(tmp_path)))
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\n\xff\xfe,b\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        read(config(source="csv", name=str(tmp_path / "a.csv")))

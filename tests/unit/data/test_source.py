"""Reading a source: parts, sizes and digests; the hub; wrong configurations."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import datasets
import pytest

from rayft.config import parse
from rayft.data import source
from rayft.data.example import Example, Message
from rayft.data.files import load_hub
from rayft.data.source import PARTS, DataConfig, majority_answer, read
from rayft.errors import ConfigError, DataError
from tests.unit.data.small_data import config, keys, lines, pairs


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
        ({"source": "image_folder", "name": "a", "rows": 3}, "limit a folder of images by train, val, test"),
        ({"name": "x", "rows": 3, "train": 1, "val": 1, "test": 1}, "give a task train, val and test"),
    ],
)
def test_a_wrong_configuration_is_an_error(values, match):
    with pytest.raises(ConfigError, match=match):
        parse(DataConfig, values)


def test_the_majority_answer_is_the_most_frequent_of_train(tmp_path):
    rows = [{"prompt": f"q{number}", "completion": "yes" if number % 3 else "no"} for number in range(60)]
    assert majority_answer(read(config(name=lines(tmp_path / "a.jsonl", rows)))) == "yes"


def test_the_split_of_a_file_depends_on_the_seed_only(tmp_path):
    rows = pairs(0, 100)
    parts = read(config(name=lines(tmp_path / "a.jsonl", rows)))
    assert [len(part) for part in keys(parts)] == [80, 10, 10]
    assert len(set.union(*keys(parts))) == 100
    turned = read(config(name=lines(tmp_path / "b.jsonl", rows[::-1])))
    assert turned.digest == parts.digest
    assert read(config(name=str(tmp_path / "a.jsonl"), seed=1)).digest != parts.digest
    fewer = read(config(name=str(tmp_path / "a.jsonl"), train=20, val=5, test=5))
    assert [len(part) for part in keys(fewer)] == [20, 5, 5]


def test_a_part_without_a_file_is_split_off_train(tmp_path):
    files = {
        "train": lines(tmp_path / "a.jsonl", pairs(0, 50)),
        "test": lines(tmp_path / "b.jsonl", pairs(45, 60)),
    }
    parts = read(config(files=files))
    assert [len(part) for part in keys(parts)] == [41, 4, 15]
    assert len(set.union(*keys(parts))) == 60


def test_classes_that_train_lacks_are_refused(tmp_path):
    train = lines(tmp_path / "a.jsonl", [{"text": f"x{n}", "label": "ab"[n % 2]} for n in range(20)])
    test = lines(tmp_path / "b.jsonl", [{"text": "y", "label": "c"}])
    with pytest.raises(DataError, match="test has classes that train has not: c"):
        read(config(files={"train": train, "test": test}))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("10", "9", "-1"), ("-1", "9", "10")),
        (("1", "01", "001", "0"), ("0", "001", "01", "1")),
        (("--5", "3", "20"), ("--5", "20", "3")),
        (("٣", "20", "3"), ("20", "3", "٣")),
        (("-", "20", "3"), ("-", "20", "3")),
    ],
)
def test_classes_are_numbered_by_value_if_all_are_whole_numbers(tmp_path, names, labels):
    rows = [{"text": f"x{n}", "label": names[n % len(names)]} for n in range(40)]
    for order in (rows, rows[::-1]):
        assert read(config(name=lines(tmp_path / "a.jsonl", order), val=1, test=1)).labels == labels


def test_sizes_that_a_file_cannot_fill_are_refused(tmp_path):
    path = lines(tmp_path / "a.jsonl", pairs(0, 50))
    with pytest.raises(DataError, match="train should have 45 examples and gets 40 of 50 different ones"):
        read(config(name=path, train=45))
    with pytest.raises(DataError, match="test should have 60 examples and gets 50"):
        read(config(name=path, test=60))


def test_an_unreachable_hub_and_a_missing_set_are_different_errors(monkeypatch):
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/set' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(
        DataError, match=r"reached to load 'org/set' \(Couldn't reach .* read the file with source: jsonl"
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


def test_a_cache_that_can_not_be_written_is_not_a_hub_that_can_not_be_reached(monkeypatch, tmp_path):
    (tmp_path / "set").mkdir()
    lines(tmp_path / "set" / "train.jsonl", pairs(0, 50))
    (tmp_path / "file").touch()
    own = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda _, *given, **options: own(str(tmp_path / "set"), *given, **options)
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(
        DataError, match=r"can't be kept in .*/file/cache.* \(Not a directory\): set HF_HOME to a folder"
    ):
        load_hub("org/set", "train")


def test_a_hub_set_that_the_disk_can_not_hold_can_be_used_in_part(monkeypatch, tmp_path):
    """The real library refuses it; only the hub and the disk's free space are not real."""
    (tmp_path / "set").mkdir()
    lines(tmp_path / "set" / "train.jsonl", pairs(0, 50))
    own = datasets.load_dataset

    def load(path: str, *given: Any, **options: Any) -> Any:
        assert path == "org/set"
        return own(str(tmp_path / "set"), *given, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.builder.has_sufficient_disk_space", lambda *_, **__: False)
    with pytest.raises(
        DataError, match=r"'org/set' does not fit on the disk of .*cache.*Set data.rows to use"
    ):
        load_hub("org/set", "train")
    assert len(load_hub("org/set", "train", 7)) == 7


def test_the_first_rows_of_a_hub_set_are_streamed(monkeypatch, tmp_path):
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(40)]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    table = datasets.Dataset.from_list(rows, features=features)
    read_rows = []

    def load(path, name=None, *, split, streaming):
        assert streaming
        return table.to_iterable_dataset().map(lambda row: read_rows.append(1) or row, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    parts = read(config(source="hub", name="org/set", rows=30))
    assert len(read_rows) < 40
    assert (len(parts.train), len(parts.val), len(parts.test)) == (24, 3, 3)
    assert {one.text for part in PARTS for one in getattr(parts, part)} == {row["text"] for row in rows[:30]}
    assert parts.labels == ("no", "yes")


CHATS = [
    [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "two words"}]
    for n in range(12)
]
PICTURE = [{"role": "user", "content": [{"type": "text", "text": "a picture"}]}, CHATS[0][1]]


@pytest.mark.parametrize(
    "chats",
    [
        [*CHATS, PICTURE],
        [[{**chat[0], "weight": 0}, chat[1]] if n % 3 else chat for n, chat in enumerate(CHATS)],
    ],
    ids=["contents of two types", "messages of different keys"],
)
def test_streamed_rows_of_undeclared_types_are_the_rows_of_the_set(monkeypatch, tmp_path, chats):
    """Of a file that is one list, the library knows no types before it has read all of it."""
    rows = [{"messages": turns} for turns in chats]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.json").write_text(json.dumps(rows))
    own = datasets.load_dataset
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda _, *given, **options: own(str(tmp_path / "set"), *given, **options)
    )
    found = read(config(source="hub", name="org/set", rows=10))
    assert found.digest == read(config(name=lines(tmp_path / "a.jsonl", rows[:10]))).digest


@pytest.mark.parametrize(
    ("texts", "match"),
    [([], "it has no rows"), ([*range(1000), "x"], r"its rows are of different types \(.*text")],
)
def test_a_stream_that_is_no_table_is_an_error(monkeypatch, texts, match):
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in texts))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(DataError, match=f"can't load split 'train' of 'org/set' from the hub: {match}"):
        load_hub("org/set", "train", 2000)


def test_only_the_first_rows_of_a_file_are_read(tmp_path):
    settings = config(name=lines(tmp_path / "a.jsonl", pairs(0, 40)), rows=20)
    found = read(settings)
    asked = {one.question for part in PARTS for one in getattr(found, part)}
    assert asked == {f"user: question {number}" for number in range(20)}


def test_hub_splits_are_parts_and_class_numbers_become_names(monkeypatch):
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"])
    )
    asked = []

    def load(path: str, name: str | None, split: str, streaming: bool) -> datasets.Dataset:
        assert not streaming
        asked.append((path, name, split))
        rows = [{"text": f"{split} {n}", "label": n % 2} for n in range(20)]
        return datasets.Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    parts = read(config(source="hub", name="org/set:main", files={"train": "train", "test": "validation"}))
    assert asked == [("org/set", "main", "train"), ("org/set", "main", "validation")]
    assert parts.labels == ("bad", "good")
    assert {example.text.split()[0] for example in parts.test} == {"validation"}
    assert [len(part) for part in keys(parts)] == [18, 2, 20]


def test_examples_are_frozen_and_the_digest_covers_every_field():
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
    separated = dataclasses.replace(example, separator="\n\n")
    assert source.digest([[separated]]) != source.digest([[example]])


def test_the_digest_depends_on_the_boundaries_of_fields():
    separators = ("\x1c", "\x1d", "\x1e", "\x1f", "\x1cc", "\x1cf")
    for mark in separators:
        one = Example(text=f"a{mark}b", label=0, label_name="c")
        other = Example(text="a", label=0, label_name=f"b{mark}c")
        assert source.digest([[one]]) != source.digest([[other]])
    assert source.digest([[Example(text="a\x1f\x1eb\x1f")]]) != source.digest(
        [[Example(text="a"), Example(text="b")]]
    )
    assert source.digest([[Example(text="a\x1f\x1dpart")]]) != source.digest([[Example(text="a")], []])
    assert len({source.digest([[Example(text=mark)]]) for mark in separators}) == len(separators)


TURNS = ("Be brief.", "Größe {0}?", "{0} cm", "And twice?", "{1} cm")
FIRST = {
    "6bfdad6f9f53cf24": pairs(0, 100),
    "4ef045c91a80507b": [
        {
            "messages": [
                {"role": role, "content": turn.format(n, 2 * n)}
                for role, turn in zip(("system", *("user", "assistant") * 2), TURNS, strict=True)
            ]
        }
        for n in range(30)
    ],
    "ce06c7a6891a33dd": [{"text": f"text {n}", "label": n % 2} for n in range(30)],
    "c4328fda15a3e1d7": [{"text": f"text {n}"} for n in range(30)],
}
"""Digests that version 0.1.0 computed of files without repeated questions."""


@pytest.mark.parametrize("digest", FIRST)
def test_digests_of_data_without_repeats_are_those_of_0_1_0(tmp_path, digest):
    assert read(config(name=lines(tmp_path / "a.jsonl", FIRST[digest]))).digest == digest


def test_class_names_of_thousands_of_digits_are_not_converted(tmp_path):
    rows = [{"text": f"x{n}", "label": ("1" * 5000, "2")[n % 2]} for n in range(40)]
    assert read(config(name=lines(tmp_path / "a.jsonl", rows))).labels == ("1" * 5000, "2")

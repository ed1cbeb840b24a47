"""`rayft init`: the configuration that it writes runs, and it refuses what it can't use."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from rayft.cli import app
from rayft.config import load
from rayft.errors import ConfigError, DataError, ModelError
from rayft.flow.config import PipelineConfig
from rayft.flow.data import look
from rayft.flow.init import write_configuration
from rayft.flow.sweep.preflight import preflight
from rayft.flow.train import as_sweep
from rayft.sweep.space import points

CHAT = (("user", "What is in box {}?"), ("assistant", "a {}-fold knot"))
PAIRS = [{"prompt": f"What is {n} plus {n}?", "completion": f"{2 * n}"} for n in range(40)]
CHATS = [{"messages": [{"role": role, "content": text.format(n)} for role, text in CHAT]} for n in range(30)]
ASKED = [{"question": row["prompt"], "answer": row["completion"]} for row in PAIRS]
LABELLED = [
    {"id": n, "sentence": f"box number {n} is {'red' if n % 2 else 'blue'}", "label": n % 3}
    for n in range(36)
]
TEXTS = [{"text": f"Box {n} is heavy."} for n in range(40)]


@pytest.fixture(autouse=True)
def here(prepared: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jsonl(name: str, rows: Sequence[Any]) -> Path:
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return Path(name)


def table(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    with Path(name).open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Path(name)


def parquet(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(list(rows)).to_parquet(name)
    return Path(name)


@pytest.mark.parametrize(
    ("make", "name", "rows", "form"),
    [
        (jsonl, "pairs.jsonl", PAIRS, "prompt_completion"),
        (table, "pairs.csv", PAIRS, "prompt_completion"),
        (parquet, "my pairs.parquet", PAIRS, "prompt_completion"),
        (jsonl, "chats.jsonl", CHATS, "messages"),
        (jsonl, "asked.jsonl", ASKED, "prompt_completion"),
        (table, "labelled.csv", LABELLED, "classification"),
        (jsonl, "texts.jsonl", TEXTS, "text"),
    ],
)
def test_the_configuration_runs(make: Any, name: str, rows: Any, form: str) -> None:
    shown = CliRunner().invoke(app, ["init", str(make(name, rows)), "--model", "tiny-llama"])
    assert shown.exit_code == 0, shown
    config = load(PipelineConfig, "my.yaml")
    assert config.data.format == form
    view = look(config, 1)
    assert [part.name for part in view.parts] == ["train", "val", "test"]
    assert not view.notes
    assert max(part.longest for part in view.parts) <= config.data.max_length
    plan = preflight(config)
    assert len(plan.points) == 2
    assert not plan.warnings
    assert config.sweep.grace < config.optim.steps
    one = as_sweep(config, False)
    assert len(points(one.sweep, one.run(False))) == 1


def test_the_only_data_file_of_the_folder_is_taken() -> None:
    with pytest.raises(ConfigError, match="has none: name the data"):
        CliRunner().invoke(app, ["init"], catch_exceptions=False)
    jsonl("pairs.jsonl", PAIRS)
    shown = CliRunner().invoke(app, ["init", "--model", "tiny-llama", "--out", "mine.yaml"])
    assert "wrote mine.yaml" in shown.output
    assert load(PipelineConfig, "mine.yaml").data.name == "pairs.jsonl"
    jsonl("more.jsonl", PAIRS)
    with pytest.raises(ConfigError, match=r"several data files \(more\.jsonl, pairs\.jsonl\)"):
        CliRunner().invoke(app, ["init"], catch_exceptions=False)


def test_a_file_is_replaced_only_if_that_was_asked_for(here: Path) -> None:
    data, out = jsonl("pairs.jsonl", PAIRS), here / "my.yaml"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"my\.yaml exists; .* replace it with --overwrite"):
        write_configuration(data, out, "tiny-llama")
    assert out.read_text() == "mine"
    write_configuration(data, out, "tiny-llama", overwrite=True)
    assert load(PipelineConfig, out).name == "pairs"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"a": 1, "b": 2}], r"has the columns a, b, and what is needed is one of: messages; prompt and"),
        # The question of an Alpaca row is in two columns.
        ([{"instruction": "Add", "input": "1 2", "output": "3"}], "join those that belong together"),
        ([{"prompt": "a", "completion": ""}], "the completion is empty"),
        ([{"prompt": "a", "completion": "b"}], "too little data"),
    ],
)
def test_unknown_columns_and_wrong_rows_are_refused(here: Path, rows: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        write_configuration(jsonl("odd.jsonl", rows), here / "my.yaml", "tiny-llama")
    assert not (here / "my.yaml").exists()


def test_an_empty_context_column_is_no_reason_to_refuse(here: Path) -> None:
    rows = [{"instruction": f"Double {n}", "input": "", "output": str(2 * n)} for n in range(40)]
    write_configuration(jsonl("alpaca.jsonl", rows), here / "my.yaml", "tiny-llama")
    assert load(PipelineConfig, here / "my.yaml").data.columns.prompt == "instruction"


def test_what_is_no_table_or_no_base_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"is not called .*\.jsonl.*for images"):
        write_configuration(here / "notes.txt", here / "my.yaml")
    data = jsonl("pairs.jsonl", PAIRS)
    with pytest.raises(ModelError, match="no model 'tiny-lama'; did you mean 'tiny-llama'"):
        write_configuration(data, here / "my.yaml", "tiny-lama")

    def missing(*_: object) -> None:
        raise ModelError("its weights are not installed")

    monkeypatch.setattr("rayft.flow.init.load_skeleton", missing)
    with pytest.raises(ConfigError, match=r"no base is on this machine: its weights .* with --model"):
        write_configuration(data, here / "my.yaml")


@pytest.mark.parametrize(("answer", "then"), [("yes", "cut"), ("yes " * 300, "drop")])
def test_examples_that_no_row_holds_are_cut_or_dropped(here: Path, answer: str, then: str) -> None:
    # Repeats of a question are in one part, so that they are not all there is to decide by.
    long = [{"prompt": f"{n} {'long ' * 200}", "completion": answer} for n in range(3)]
    write_configuration(jsonl("long.jsonl", [*PAIRS, *long]), here / "my.yaml", "tiny-llama")
    config = load(PipelineConfig, here / "my.yaml")
    assert config.data.too_long == then
    assert config.data.max_length == 1024
    look(config, 0)

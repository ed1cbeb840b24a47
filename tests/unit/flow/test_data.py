"""What a person is shown of the data before training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rayft.cli import app
from rayft.data.pack import collate
from rayft.flow.config import load_config
from rayft.flow.data import DataView, look
from rayft.train.session import Session
from rayft.train.worker import Worker


def configured(folder: Path, rows: list[dict[str, Any]], **data: Any) -> Path:
    source = folder / "data.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "my.yaml"
    config = {
        "name": "mine",
        "model": {"name": "tiny-llama"},
        "data": {"source": "jsonl", "name": str(source), "max_length": 64, "val": 2, "test": 2, **data},
        "optim": {"lr": 0.01, "steps": 2, "rows_per_step": 4},
        "sweep": {"methods": {"lora": {"ranks": [2], "lr": [0.01]}}},
    }
    path.write_text(json.dumps(config))
    return path


ROWS = [{"prompt": f"{'q' * n}?", "completion": f"a{n}"} for n in range(1, 31)]


def shown(view: DataView) -> str:
    return "".join(run.text for example in view.examples[0] for run in example)


def test_it_is_what_training_gets(tmp_path: Path) -> None:
    path = configured(tmp_path, ROWS)
    config = load_config(path)
    view = look(config, 3)
    session = Session.open(config.run(False), Worker())
    stream = session.row_stream(config.run(False))
    rows = stream.epoch(0)
    train, val, _ = view.parts
    lengths = sorted(len(text) for text in session.train)
    assert (train.examples, train.texts, train.tokens) == (26, 26, sum(lengths))
    assert (train.median, train.most, train.longest) == (lengths[12], lengths[24], lengths[25])
    assert (val.name, val.examples) == ("val", 2)
    assert (view.rows, view.steps) == (len(rows), len(rows) / 4)
    batches = [collate(rows[start : start + 4], 0) for start in range(0, len(rows), 4)]
    assert view.padding == pytest.approx(1 - sum(lengths) / sum(one.input_ids.numel() for one in batches))
    learnt = sum(len(batch.targets) for batch in batches)
    assert train.learnt == pytest.approx(learnt / sum(lengths))
    decode = session.loaded.tokenizer.decode
    assert len(view.examples) == 3
    assert shown(view) == "".join(decode(example.input_ids) for example in rows[0].examples)
    for example in view.examples[0]:
        answers = [run.text for run in example if run.learnt]
        assert len(answers) == 1
        assert answers[0].startswith("a")


def test_the_command_prints_it(tmp_path: Path) -> None:
    path = configured(tmp_path, [*ROWS, ROWS[0]], max_length=45, too_long="drop")
    found = CliRunner().invoke(app, ["data", str(path), "--rows", "1"], env={"COLUMNS": "120"})
    assert found.exit_code == 0, found.output
    assert "dropped 1 of 31 rows whose question and answer an earlier one has" in found.output
    dropped = re.search(r"train: dropped (\d+) of (\d+) examples with more than 45 tokens", found.output)
    assert dropped is not None
    gone, examples = map(int, dropped.groups())
    # The numbers of examples, and of texts that are left of them.
    assert re.search(rf"train +│ +{examples} +│ +{examples - gone} ", found.output)
    assert "row 1" in found.output
    assert "q?" in found.output
    assert "[a" in found.output
    assert "padding is" in found.output
    none = CliRunner().invoke(app, ["data", str(path), "--rows", "0"], env={"COLUMNS": "120"})
    assert "row 1" not in none.output

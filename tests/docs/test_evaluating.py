"""The page on evaluating lists every scorer, and its examples work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import yaml

from rayft.config import parse
from rayft.data.scorer import scorer_of
from rayft.data.section import DataConfig, ScorerConfig, ScorerKind
from rayft.data.source import Example, Message

TEXT = (Path(__file__).parents[2] / "docs" / "evaluating.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_table_has_every_scorer() -> None:
    table = TEXT[TEXT.index("| `kind` |") :].split("\n\n", 1)[0]
    assert set(re.findall(r"^\| `(\w+)`(?: \(default\))? \|", table, flags=re.MULTILINE)) == {
        *get_args(ScorerKind),
        "kind",
    }


def test_the_configuration_is_valid() -> None:
    (block,) = blocks("yaml")
    assert parse(DataConfig, yaml.safe_load(block)["data"]).scorer.tolerance == 0.01


def test_the_function_scores(tmp_path: Path) -> None:
    (block,) = blocks("python")
    (tmp_path / "file.py").write_text(block)
    scorer = scorer_of(ScorerConfig(kind="python", function=f"{tmp_path / 'file.py'}:name"))
    example: Any = Example(messages=(Message("user", "?"), Message("assistant", "five")))
    assert [scorer.score(example, answer) for answer in ("five", "four", "six")] == [1, 0.5, 0]
    assert scorer.failures == 0

"""Small data sets and their configurations, for the tests of data sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayft.config import parse
from rayft.data.source import DataConfig, Parts


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

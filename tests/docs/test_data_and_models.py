"""The page on data and models has valid configurations, and its tables are complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from rayft.config import parse
from rayft.data.formats import FORMATS
from rayft.models.load import REGISTERED, Task
from rayft.train.run import RunConfig

TEXT = (Path(__file__).parents[2] / "docs" / "data-and-models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)


def first_column(title: str) -> set[str]:
    """Return the names in the first column of the first table after a title."""
    table = TEXT[TEXT.index(title) :].split("|---|", 1)[1].split("\n\n", 1)[0]
    return set(re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_the_pages_configurations_are_valid(block: str) -> None:
    run = parse(RunConfig, yaml.safe_load(block))
    images = run.data.source == "image_folder" or run.data.columns.image != "image"
    assert images == (run.model.task == "image_classification")


def test_the_page_lists_every_task_format_and_registered_model() -> None:
    assert len(BLOCKS) == 4
    assert first_column("# Data") == set(get_args(Task))
    assert all(f"`{name}`" in TEXT for name in FORMATS)
    assert first_column("## Models that need no hub") == set(REGISTERED)

"""A test runs each example command by command (`tests/e2e/test_examples.py`), and the index lists it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.parent.name for path in (ROOT / "examples").glob("*/README.md")}


def test_a_test_runs_every_example() -> None:
    run = (ROOT / "tests" / "e2e" / "test_examples.py").read_text(encoding="utf-8")
    # Each list of commands is taken apart, so that a further command in a README is an error.
    assert {*re.findall(r'[\w, *]+ = readme\("(\w+)"\)', run)} == EXAMPLES
    folders = {path.name for path in (ROOT / "examples").iterdir() if path.is_dir()}
    assert folders == EXAMPLES, "an example has a README"


def test_the_index_lists_every_example() -> None:
    index = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert {*re.findall(r"^\| \[(\w+)\]\(\1/\)", index, flags=re.M)} == EXAMPLES

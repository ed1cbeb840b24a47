"""The examples of docs/python-api.md run as they are, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import rayft

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray", "in_warm_workers"),
]

PAGE = (Path(__file__).parents[2] / "docs" / "python-api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in EXAMPLES:
        exec(example, names)  # noqa: S102  (that is what the page is for)
    # No warnings, log lines or progress bars of libraries, and no empty lines.
    said = capfd.readouterr()
    assert said.err == ""
    assert "" not in said.out.splitlines()

    run, sweep, small = names["run"], names["sweep"], names["small"]
    assert run.adapter == tmp_path / "runs" / "mine" / "adapter"
    assert {*run.scores} == {*sweep.scores} == {"val", "test"}
    assert sweep.report.is_file()
    assert sweep.winner in sweep.trials
    assert (len(sweep.trials), dict(sweep.failed)) == (2, {})
    assert rayft.load(sweep.adapter).rank <= 4
    assert sweep.run_id == sweep.winner.run_id
    assert [rayft.load(small.adapters[label]).rank for label in ("r2", "r1")] == [2, 1]
    assert names["model"].peft_config["default"].r == 2


def test_the_page_shows_every_function() -> None:
    functions = {name for name in rayft.__all__ if name.islower() and not name.startswith("_")}
    assert {name for name in functions if f"rayft.{name}(" not in "".join(EXAMPLES)} == set()
    assert {name for name in functions if f"| `rayft.{name}(" not in PAGE} == set()

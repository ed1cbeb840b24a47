"""The README is short, its figure and tables are those of the results, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.demo_figure import PICTURE, draw
from benchmarks.records import PAGES, cases, load, with_tables
from rayft.cli import app
from rayft.config import parse, read_yaml
from rayft.flow.config import PipelineConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_at_most_900_words() -> None:
    assert len(README.split()) <= 900


def test_the_tables_are_made_from_the_results() -> None:
    assert load("demo"), "no results: run benchmarks/bench_demo.py"
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert with_tables(text) == text, f"stale table in {name}: run `python -m benchmarks.records`"


def test_the_figure_shows_the_results_of_the_demo() -> None:
    shown = PICTURE.read_text(encoding="utf-8")
    points = re.findall(r"<title>([^<]*)</title>", shown)
    assert points == re.findall(r"<title>([^<]*)</title>", draw(cases("demo")).svg), (
        "stale figure: run `python -m benchmarks.records`"
    )
    assert len(points) == sum("parameters" in metrics for metrics in cases("demo").values())
    assert "var(" not in shown, "the figure has a colour or font that only the report's page defines"
    assert f'src="{PICTURE.relative_to(ROOT)}"' in README


def test_every_command_in_the_readme_exists() -> None:
    commands = set(re.findall(r"\.venv/bin/rayft (\w+)", README))
    assert commands
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
    targets = set(re.findall(r"^make (\w+)", README, flags=re.M))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)


def test_the_readmes_configuration_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    config = parse(PipelineConfig, read_yaml(block))
    assert set(config.sweep.methods) == {"lora", "cla"}

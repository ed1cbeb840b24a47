"""The README's tables are the results', and its commands and names exist."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.records import PAGES, load, with_tables
from rayft.cli import app
from rayft.config import parse, read_yaml
from rayft.flow.config import PipelineConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_tables_are_made_from_the_results() -> None:
    assert load("demo"), "no results: run benchmarks/bench_demo.py"
    for name in PAGES:
        text = (ROOT / name).read_text()
        assert with_tables(text) == text, f"stale table in {name}: run `python -m benchmarks.records`"


def test_every_command_in_it_exists() -> None:
    commands = set(re.findall(r"\.venv/bin/rayft (\w+)", README))
    assert commands
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
    targets = set(re.findall(r"^make (\w+)", README, flags=re.M))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)


def test_its_configuration_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    config = parse(PipelineConfig, read_yaml(block))
    assert set(config.sweep.methods) == {"lora", "cla"}

"""What the demo says first, and what it does with an earlier demo in its folder."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.records import load
from rayft.errors import ConfigError
from rayft.flow import demo
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.introduction import MEASURED_ON, MEASURED_SECONDS, introduce
from rayft.flow.sweep.folder import stamp_line
from rayft.sweep.space import points
from tests.meta.test_style import HEAVY


def said(*overrides: str) -> str:
    text = io.StringIO()
    introduce(overrides, Console(file=text, width=1000))
    return text.getvalue()


def test_the_duration_is_the_measured_one() -> None:
    (whole,) = (item for item in load("demo") if item["case"] == "whole" and item["metric"] == "seconds")
    assert round(whole["value"], 1) == MEASURED_SECONDS
    assert whole["device"].endswith("2 threads, bfloat16")
    assert MEASURED_ON == "a CPU with 2 threads"
    assert "From nothing this took 5m 55s on a CPU with 2 threads." in said("output=/tmp/x", "serve.port=1")


def test_other_settings_have_no_measured_duration() -> None:
    assert "how long yours take was not measured" in said("optim.steps=400")


def test_the_demo_trains_as_many_adapters_as_it_says() -> None:
    config = load_config("demo")
    assert len(points(config.sweep, config.run(gpus=False))) == 4
    assert "it trains four adapters" in said()


def test_the_command_line_speaks_before_it_imports_what_takes_long() -> None:
    program = f"import sys, rayft.cli; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == []


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return load_config("tiny", [f"output={tmp_path / 'out'}"])


def with_trial(config: PipelineConfig, stamp: str) -> Path:
    result = config.folder / "trials" / "one" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    (config.folder / "config.yaml").write_text(stamp)
    return result


def test_an_earlier_demo_is_kept_and_named(config: PipelineConfig) -> None:
    assert demo.earlier(config, overwrite=False) == ""
    result = with_trial(config, stamp_line(config))
    assert "1 trained adapter: this one starts from it" in demo.earlier(config, overwrite=False)
    assert result.exists()
    assert demo.earlier(config, overwrite=True) == ""
    assert not result.exists()


def test_a_demo_with_other_settings_is_refused_unless_it_may_be_deleted(config: PipelineConfig) -> None:
    other = load_config("tiny", ["optim.steps=4"])
    result = with_trial(config, stamp_line(other) + other.model_dump_json())
    with pytest.raises(ConfigError, match=r"optim.steps was 4, now 8.*as --overwrite does"):
        demo.earlier(config, overwrite=False)
    assert result.exists()
    assert demo.earlier(config, overwrite=True) == ""
    assert not result.exists()

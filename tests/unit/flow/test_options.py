"""An option that would change nothing is refused, and the message says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import rayft
from rayft.analysis.section import PARTS, READERS, AnalyzeConfig
from rayft.cli import app
from rayft.errors import ConfigError, SqueezeError
from rayft.flow.options import refuse_unused
from rayft.models.load import ModelConfig
from tests.unit.flow.answers import CONFIG
from tests.unit.flow.export.adapters import random_adapter
from tests.unit.report.example import example


@pytest.fixture(autouse=True)
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an adapter, a tuned model, a sweep and a configuration."""
    monkeypatch.chdir(tmp_path)
    random_adapter(ModelConfig(name=str(tiny_folder)), rank=4).save(tmp_path / "adapter")
    (tmp_path / "tuned").symlink_to(tiny_folder)
    example().save(tmp_path / "sweep/sweep.json")
    (tmp_path / "sweep/config.yaml").write_text(f"# sweep 0123\n{CONFIG}")
    (tmp_path / "my.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export adapter --vllm v --uri sqlite:///m.db", "--uri is for models:/…, and adapter is none"),
        (
            "export adapter --gguf g --base-name org/m",
            "--base-name would .* a file for llama.cpp names no base",
        ),
        ("export adapter --vllm v --sweep sweep", "--sweep would change nothing, because its scores are for"),
        ("export models:/a --vllm v --sweep sweep --uri sqlite:///m.db", "--sweep would change nothing"),
        ("squeeze adapter --rank 2 --out o --uri sqlite:///m.db", "--uri is for models:/…"),
        (
            "squeeze tuned --rank 2 --out o --base tiny-llama --config my.yaml",
            "--config would .* --base tiny-ll",
        ),
        ("squeeze adapter --rank 2 --out o --lr 1e-3", "--lr is the learning rate of --steps"),
        (
            "analyze sweep --config my.yaml",
            "--config would change nothing, because the sweep in sweep has its",
        ),
        ("analyze sweep --config my.yaml --uri http://m", "--config and --uri would .*; leave them out"),
        ("analyze adapter --config my.yaml --uri http://m", "--uri is for models:/…"),
        (
            "promote a 1 --sweep sweep --uri sqlite:///m.db",
            "--sweep would .* looked up in --uri sqlite:///m.db",
        ),
        ("promote a 1 --force --tolerance 0.1", "--tolerance would .* --force promotes whatever the score"),
        ("adapters list mine", "the name would change nothing, because all adapters are listed"),
        (
            "adapters list --weight 1",
            "--weight would change nothing, because it is for load, and this is list",
        ),
        ("adapters unload mine folder", "the source would change nothing"),
        ("adapters promote mine --weight 0.5 --pinned", "--weight and --pinned would .* and this is promote"),
        ("adapters rollback mine --pinned", "--pinned would change nothing"),
        (
            "train my.yaml --set squeeze.ranks=[1]",
            "--set squeeze.ranks would .*rayft train.* use `rayft sweep`",
        ),
        ("sweep my.yaml --set method.rank=2", "--set method.rank would .*rayft sweep.* use sweep.methods"),
        ("sweep my.yaml --set optim.lr=1", r"--set optim\.lr would .* use sweep\.methods\.METHOD\.lr"),
        ("demo --set anneal.ranks=[2]", r"--set anneal.ranks would .* use sweep\.methods\.METHOD\.anneal"),
        ("eval adapter --config my.yaml --chat-template", "--chat-template is for tasks"),
        ("eval adapter --config my.yaml --overwrite", "--overwrite is for the file of the result"),
        ("eval adapter --config my.yaml --set squeeze.ranks=[1]", "--set squeeze.ranks changes nothing"),
        ("chat adapter --uri sqlite:///m.db", "--uri is for models:/…"),
        ("chat a --url http://127.0.0.1:9 --base b", "--base is for models in this process"),
        ("config my.yaml --schema", "leave out my.yaml"),
        ("cache --limit 1GB list", "--limit needs no command after it"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(command: str, message: str, here: Path) -> None:
    before = sorted(here.rglob("*"))
    with pytest.raises((ConfigError, SqueezeError), match=message):
        CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert sorted(here.rglob("*")) == before


def test_the_python_functions_refuse_what_the_commands_refuse() -> None:
    with pytest.raises(ConfigError, match=r"--set method\.rank would change nothing"):
        rayft.sweep("my.yaml", overrides=["method.rank=2"])
    with pytest.raises(ConfigError, match=r"--set serve\.port would change nothing"):
        rayft.train("my.yaml", overrides=["serve.port=1"])


def test_a_setting_of_parts_that_are_not_analysed_is_refused(here: Path) -> None:
    (here / "answers.jsonl").write_text(
        "\n".join(f'{{"prompt": "How many in box {box}?", "completion": "5"}}' for box in range(12))
    )
    command = "analyze adapter --config my.yaml --out o --parts spectra --set"
    with pytest.raises(
        ConfigError, match=r"--set grid would .* line, landscape, trajectory read it, and spectra"
    ):
        CliRunner().invoke(app, [*command.split(), "analyze.grid=5"], catch_exceptions=False)
    assert READERS.keys() == AnalyzeConfig.model_fields.keys() - {"parts"}
    assert {part for parts in READERS.values() for part in parts} == {*PARTS}


def test_false_and_none_are_not_given() -> None:
    refuse_unused({"--a": None, "--b": False}, "they are not given")
    with pytest.raises(
        ConfigError, match=r"^--a and --b would change nothing, because of c; leave them out$"
    ):
        refuse_unused({"--a": 0, "--b": ""}, "of c")

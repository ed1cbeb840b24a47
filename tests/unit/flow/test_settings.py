"""`rayft config`: the settings in force, where each comes from, and the JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from rayft.cli import app
from rayft.config import parse, read_yaml
from rayft.errors import ConfigError
from rayft.flow.config import TrainConfig, load_train_config, packaged
from rayft.flow.settings import DEFAULT, schema, settings

MINE = """
name: mine
data: {source: jsonl, name: "a b.jsonl", params: {}, separator: "\\n\\n"}
method: {rank: 8, rank_pattern: {"model.layers.0.q_proj": 4}}
sweep: {methods: {lora: {lr: {low: 1e-4, high: 3e-3}}}}
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RAYFT_OUTPUT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "mine.yaml").write_text(MINE)
    return tmp_path / "mine.yaml"


def sources(name: str | Path, *overrides: str) -> dict[str, str]:
    """Return line → source."""
    return {line.text.strip(): line.source for line in settings(name, overrides).lines}


def test_each_value_is_shown_with_its_source(mine: Path) -> None:
    found = sources(mine, "sweep.trials=4", "method.rank=2")
    assert found["name: mine"] == found["low: 0.0001"] == found["model.layers.0.q_proj: 4"] == str(mine)
    assert found["trials: 4"] == found["rank: 2"] == "--set"
    assert found["steps: 40"] == DEFAULT
    assert found["optim:"] == ""
    assert sources("tiny")["steps: 8"] == "tiny.yaml of rayft"


def test_an_override_of_a_section_is_the_source_of_all_in_it(mine: Path) -> None:
    found = sources(mine, "sweep.methods={cla: {ranks: [4]}}", "optim.betas=[0.5, 0.9]")
    assert found["ranks: [4]"] == found["betas: [0.5, 0.9]"] == "--set"
    assert "lora:" not in found


@pytest.mark.parametrize("name", [*packaged(), "mine.yaml"])
def test_what_is_shown_means_the_same_as_the_file(mine: Path, name: str) -> None:
    text = "\n".join(line.text for line in settings(name, ["seed=3"]).lines)
    shown, meant = parse(TrainConfig, read_yaml(text)), load_train_config(name, ["seed=3"])
    places: dict[str, Any] = {"output": None, "tracking": meant.tracking}
    assert shown.model_copy(update=places) == meant.model_copy(update=places)


def test_defaults_that_the_environment_decides_name_the_variable(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An earlier test may have started Ray in this process.
    monkeypatch.setattr("rayft.flow.address.on_cluster", lambda: False)
    assert sources(mine)[f"output: {mine.parent / 'runs' / 'mine'}"] == DEFAULT
    monkeypatch.setenv("RAYFT_OUTPUT", "/elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@there")
    monkeypatch.setenv("RAYFT_CACHE", "/cache")
    found = sources(mine)
    assert found["output: /elsewhere/mine"] == "RAYFT_OUTPUT"
    assert found["uri: http://me:***@there"] == "MLFLOW_TRACKING_URI"
    assert found["# RAYFT_CACHE=/cache"] == "environment"
    assert sources(mine, "output=/own")["output: /own"] == "--set"


def test_the_command_prints_yaml_with_comments(mine: Path) -> None:
    shown = CliRunner().invoke(app, ["config", "mine.yaml", "--set", "seed=3"])
    assert shown.exit_code == 0, shown
    assert read_yaml(shown.output)["seed"] == 3
    assert f"# {mine.name}" in shown.output
    wrong = CliRunner().invoke(app, ["config", "mine.yaml", "--set", "sead=3"])
    assert isinstance(wrong.exception, ConfigError)
    assert "did you mean 'seed'" in str(wrong.exception)


def problems(config: dict[str, Any]) -> list[str]:
    checker = jsonschema.Draft202012Validator(schema())
    return [f"{error.json_path}: {error.message}" for error in checker.iter_errors(config)]


def test_the_schema_is_one_of_draft_2020_12() -> None:
    shown = CliRunner().invoke(app, ["config", "--schema"])
    printed = json.loads(shown.output)
    assert printed == schema()
    assert printed["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]
    jsonschema.Draft202012Validator.check_schema(printed)


@pytest.mark.parametrize("name", packaged())
def test_packaged_configurations_fit_the_schema(name: str) -> None:
    assert problems(read_yaml(packaged()[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"optim": {"step": 3}}, "'step' was unexpected"),
        ({"swep": {}}, "'swep' was unexpected"),
        ({"sweep": {"methods": {"lora": {"rank": [3]}}}}, "$.sweep"),
        ({"optim": {"steps": "8"}}, "'8' is not of type 'integer'"),
        ({"optim": {"steps": 0}}, "less than the minimum"),
        ({"optim": {"schedule": "cosine"}}, "'cosine' is not one of"),
    ],
)
def test_a_mistake_does_not_fit_the_schema(change: dict[str, Any], problem: str) -> None:
    (found,) = problems(read_yaml(packaged()["tiny"].read_text(encoding="utf-8")) | change)
    assert problem in found


def test_the_schema_describes_every_key() -> None:
    found = schema()
    bare = [
        f"{name}.{key}"
        for name, section in {"": found, **found["$defs"]}.items()
        for key, value in section.get("properties", {}).items()
        if "description" not in value and "$ref" not in value and "anyOf" not in value
    ]
    assert not bare
    assert not [
        name for name, section in found["$defs"].items() if name != "JsonValue" and not section["description"]
    ]


def test_an_empty_list_of_gpus_is_shown_and_a_schema_has_no_overrides(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RAYFT_CACHE", "")
    found = settings(mine).environment
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    assert "RAYFT_CACHE" not in found
    with pytest.raises(ConfigError, match="leave out --set"):
        CliRunner().invoke(app, ["config", "--schema", "--set", "seed=1"], catch_exceptions=False)

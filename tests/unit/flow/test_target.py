"""A folder, an output folder and a registered adapter, each perhaps at a rank: every verb takes the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rayft
from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, ConfigError, RayftError, RegistryError, SqueezeError
from rayft.flow.analyze.source import find_items
from rayft.flow.target import split_rank
from rayft.flow.train import start_folder
from rayft.models.load import ModelConfig
from rayft.numerics import assert_close
from rayft.registry.store import MlflowRegistry
from rayft.squeeze.rank import squeeze
from rayft.tracking.base import TrackerSpec
from rayft.tracking.mlflow import MlflowTracker
from tests.unit.flow.answers import CONFIG
from tests.unit.flow.export.adapters import random_adapter

Verb = Callable[[str, str | None, Path], AdapterArtifact]


@pytest.fixture
def output(tiny_folder: Path, tmp_path: Path) -> Path:
    """An output folder of `rayft train`, with an adapter of rank 4."""
    folder = tmp_path / "mine"
    random_adapter(ModelConfig(name=str(tiny_folder)), rank=4).save(folder / "adapter")
    (folder / "config.yaml").write_text(f"# sweep 0123\n{CONFIG}")
    return folder


def load(target: str, uri: str | None, scratch: Path) -> AdapterArtifact:
    return rayft.load(target, uri=uri).artifact


def export(target: str, uri: str | None, scratch: Path) -> AdapterArtifact:
    rayft.export(target, vllm=scratch / "vllm", uri=uri)
    return AdapterArtifact.load(scratch / "vllm")


def squeezed(target: str, uri: str | None, scratch: Path) -> AdapterArtifact:
    # It can't be squeezed to a higher rank than the one at which squeezing starts.
    rank = split_rank(target)[1] or 4
    with pytest.raises(SqueezeError, match=str(rank)):
        rayft.squeeze(target, ranks=[rank + 1], out=scratch / "out", uri=uri, quiet=True)
    found = rayft.squeeze(target, ranks=[rank], out=scratch / "out", uri=uri, quiet=True)
    return AdapterArtifact.load(found.adapters[f"r{rank}"])


def analyzed(target: str, uri: str | None, scratch: Path) -> AdapterArtifact:
    config, data = scratch / "my.yaml", scratch / "answers.jsonl"
    data.write_text(ROWS)
    config.write_text(CONFIG.replace("answers.jsonl", str(data)))
    (item,) = find_items(target, config, uri, scratch).items
    return AdapterArtifact.load(item.folder)


ROWS = "\n".join(f'{{"prompt": "How many in box {box}?", "completion": "5"}}' for box in range(12))
VERBS: list[Verb] = [load, export, squeezed, analyzed]


@pytest.mark.parametrize("verb", [load, export, squeezed])
def test_a_target_that_is_not_there_is_an_error_that_says_so(
    verb: Verb, output: Path, tmp_path: Path
) -> None:
    with pytest.raises(RayftError, match="there is no folder"):
        verb(str(tmp_path / "nothing@r2"), None, tmp_path)
    with pytest.raises(ConfigError, match="nothing is no folder here"):
        rayft.evaluate(str(tmp_path / "nothing"))
    # A sweep that has not ended has no winner yet.
    shutil.rmtree(output / "adapter")
    with pytest.raises(ArtifactError, match="mine has no winner: let it end first"):
        verb(str(output), None, tmp_path)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_takes_an_output_folder_and_a_rank(verb: Verb, output: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "half").mkdir()
    assert verb(str(output), None, tmp_path / "whole").rank == 4
    half = verb(f"{output}@r2", None, tmp_path / "half")
    assert half.rank == 2
    expected = squeeze(AdapterArtifact.load(output / "adapter"), rank=2)
    for module, factors in half.modules.items():
        other = expected.modules[module]
        assert_close(
            factors.scale * factors.b @ factors.a, other.scale * other.b @ other.a, torch.float32, 4, 8
        )
    assert AdapterArtifact.load(output / "adapter").rank == 4


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_takes_a_registered_adapter_and_a_rank(
    verb: Verb, output: Path, tmp_path: Path, spec: TrackerSpec
) -> None:
    registry = MlflowRegistry(spec.uri)
    with MlflowTracker(spec) as tracker:
        registry.register("sums", tracker.run("trial", "t0"), output / "adapter", {})
    registry.alias("sums", "champion", 1)
    assert verb("models:/sums@champion@r3", spec.uri, tmp_path).rank == 3
    with pytest.raises(RegistryError, match="has no alias 'other'"):
        verb("models:/sums@other", spec.uri, tmp_path)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_refuses_a_rank_that_is_not_there(verb: Verb, output: Path, tmp_path: Path) -> None:
    with pytest.raises(SqueezeError, match="has rank 4; ask for 1 to 4, not 9"):
        verb(f"{output}@r9", None, tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    with pytest.raises(SqueezeError, match="is no adapter, so it has no rank; leave out @r2"):
        verb(f"{tmp_path / 'base'}@r2", None, tmp_path)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_refuses_a_registry_that_it_does_not_need(verb: Verb, output: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--uri is for models:/…, and .*mine is none: leave it out"):
        verb(str(output), "sqlite:///mlflow.db", tmp_path)


def test_a_run_goes_on_from_a_folder_that_stays(output: Path) -> None:
    assert start_folder(str(output), "--start") == output / "adapter"
    with pytest.raises(
        ConfigError, match=r"--start .*mine@r2 is not in a folder that stays .* --rank 2 --out"
    ):
        start_folder(f"{output}@r2", "--start")
    with pytest.raises(ConfigError, match="squeeze models:/sums@champion --rank RANK"):
        start_folder("models:/sums@champion", "--start")


def test_results_of_a_registered_adapter_need_a_folder(output: Path, spec: TrackerSpec) -> None:
    with MlflowTracker(spec) as tracker:
        run = tracker.run("trial", "t0")
        MlflowRegistry(spec.uri).register("sums", run, output / "adapter", {})
    with pytest.raises(SqueezeError, match="models:/sums/1 is in a registry: name a folder"):
        rayft.squeeze("models:/sums/1", ranks=[2], uri=spec.uri)


def test_an_adapter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        rayft.load(tmp_path / "nowhere@r2")

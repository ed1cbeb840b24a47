"""What is refused before anything starts, and loses nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rayft.errors import (
    ConfigError,
    DataError,
    DiskFullError,
    ModelError,
    RayftError,
    ResourceError,
    TargetError,
    TrackingError,
)
from rayft.flow.cluster import check_tracking
from rayft.flow.config import PipelineConfig, load_config, packaged
from rayft.flow.sweep.preflight import _check_other_disks, preflight, skeleton
from rayft.models.load import ModelConfig, load_model
from rayft.models.targets import linear_shapes
from rayft.tracking.base import TrackerSpec
from tests.disks import Disk


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path_factory.mktemp("cache")))


def tiny(tmp_path: Path, *overrides: str) -> PipelineConfig:
    return load_config("tiny", [f"output={tmp_path / 'out'}", *overrides])


@pytest.mark.parametrize("name", sorted(packaged()))
def test_every_packaged_configuration_is_valid(name: str) -> None:
    config = load_config(name)
    assert config.name == name


def test_a_plan_has_everything_decided(tmp_path: Path) -> None:
    plan = preflight(tiny(tmp_path))
    assert len(plan.points) == 3
    assert plan.executor == "lane"
    assert plan.run.scale.device == "cpu"
    assert plan.tracker.experiment_id
    assert (tmp_path / "out" / "config.yaml").is_file()
    again = load_config(tmp_path / "out" / "config.yaml")
    assert [p.key for p in preflight(again).points] == [p.key for p in plan.points]


@pytest.mark.parametrize(
    ("override", "error", "match"),
    [
        ("sweep.methods.lora.ranks=[40]", TargetError, r"rank 40 is above .* at most 16"),
        ("sweep.methods.lora.targets=[q_porj]", TargetError, "did you mean 'q_proj'"),
        ("model.name=tiny-lama", ModelError, "did you mean 'tiny-llama'"),
        ("data.max_length=20", DataError, "too long"),
        ("data.name=needle_haystak", DataError, "needle_haystack"),
        ("scale.device=cuda", ResourceError, "no GPU is here"),
        ("sweep.trials=1", ConfigError, "at least one trial each"),
        ("tracking.uri=./mlruns", TrackingError, "sqlite"),
        ("model.task=sequence_classification", ConfigError, "has no classes"),
        ("sweep.methods.lora.rank_pattern={q_porj: 2}", TargetError, "did you mean 'q_proj'"),
        (
            "sweep.methods={rac: {chain: {epochs: 50}}}",
            ConfigError,
            "would begin at step .* raise optim.steps",
        ),
        ("sweep.methods={c3la: {ranks: [16], chain: {links: 4}}}", TargetError, "at most 2 links"),
    ],
)
def test_mistakes(tmp_path: Path, override: str, error: type[RayftError], match: str) -> None:
    with pytest.raises(error, match=match):
        preflight(tiny(tmp_path, override))


def test_another_sweeps_folder_is_left_alone(tmp_path: Path) -> None:
    preflight(tiny(tmp_path))
    kept = (tmp_path / "out" / "config.yaml").read_text()
    steps = tiny(tmp_path).optim.steps
    match = (
        rf"holds a sweep with another configuration \(.*\): optim\.steps was {steps}, now 9\. Nothing of it"
    )
    with pytest.raises(ConfigError, match=match):
        preflight(tiny(tmp_path, "optim.steps=9", "squeeze.ranks=[1]"))
    assert (tmp_path / "out" / "config.yaml").read_text() == kept
    # What does not decide results may change.
    preflight(tiny(tmp_path, "serve.port=9000", "question=another"))


def test_a_folder_of_an_earlier_version_is_named_as_one(tmp_path: Path) -> None:
    preflight(tiny(tmp_path))
    stamp = tmp_path / "out" / "config.yaml"
    _, content = stamp.read_text(encoding="utf-8").split("\n", 1)
    # The same configuration, whose hash that version computed from other fields.
    stamp.write_text("# sweep 0542ad439fd1\n" + content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"as an earlier version of rayft made it.*can be read as it is"):
        preflight(tiny(tmp_path))
    stamp.write_text("# sweep 0542ad439fd1\n" + content.replace('"grace"', '"patience"'), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"can't read: unknown key 'sweep\.patience'"):
        preflight(tiny(tmp_path))


def test_a_full_disk(tmp_path: Path, disk: Disk) -> None:
    with pytest.raises(
        DiskFullError, match=rf"below {disk.folder}/out \(.* tracked adapters\), but only 0\.1 GiB are free"
    ):
        preflight(tiny(disk.folder))


def test_other_full_disks(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for setting in ("RAYFT_CACHE", "RAY_TMPDIR", "TMPDIR"):
        with monkeypatch.context() as patch:
            patch.setenv(setting, str(disk.folder))
            patch.setattr("tempfile.tempdir", None)
            with pytest.raises(
                DiskFullError, match=rf"{disk.folder}.* has only 6\d MiB free.* set {setting} to"
            ):
                _check_other_disks(tmp_path)
    disk.resize(2**30)
    monkeypatch.setenv("RAY_TMPDIR", str(disk.folder))
    assert _check_other_disks(tmp_path) == ()
    os.posix_fallocate(os.open(disk.folder / "filler", os.O_CREAT | os.O_RDWR), 0, int(2**30 * 0.96))
    monkeypatch.setattr("rayft.flow.sweep.preflight.SCRATCH", 2**20)
    (warning,) = _check_other_disks(tmp_path)
    assert "more than 95% full, so Ray can't move objects" in warning


def test_what_a_sweep_writes_is_each_trials_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    copies: list[int] = []

    def ask(_output: Path, written: int, beside: int) -> None:
        asked.append(written)
        copies.append(beside)

    monkeypatch.setattr("rayft.flow.sweep.preflight._check_disk", ask)
    methods = {"lora": "{lora: {ranks: [4], lr: [1e-2]}}", "full": "{full: {lr: [1e-4]}}"}
    both = "{lora: {ranks: [4], lr: [1e-2]}, full: {lr: [1e-4]}}"
    for index, given in enumerate((*methods.values(), both)):
        preflight(tiny(tmp_path / str(index), f"sweep.methods={given}"))
    lora, full, together = asked
    # A trial keeps 4 bytes of an adapter and 16 of a checkpoint for each number; the lane 32 of two more.
    lora_numbers, full_numbers = lora // 52, full // 52
    assert together == 20 * (lora_numbers + full_numbers) + 32 * full_numbers
    assert full > 2 * lora
    # A tracked copy of the trial; the winner and two squeezed adapters, twice; the registered one.
    assert copies[0] == 4 * lora_numbers * (1 + 2 * 3 + 1)
    # The whole model, whose embeddings no adapter has.
    assert copies[1] > 4 * full_numbers
    assert copies[2] == copies[0] + copies[1]
    trail = ("evaluate.trail=true", "evaluate.every=2")
    preflight(tiny(tmp_path / "trail", f"sweep.methods={methods['lora']}", *trail))
    # Eight steps have four evaluations: five adapters are written, not one, beside the checkpoints.
    assert asked[-1] == lora + 4 * 4 * lora_numbers
    preflight(tiny(tmp_path / "model", f"sweep.methods={methods['full']}", *trail))
    assert asked[-1] == full, "whole models leave no trail"


def test_sqlite_on_several_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}, {"Alive": True}])
    with pytest.raises(TrackingError, match="start `mlflow server`"):
        check_tracking(TrackerSpec(f"sqlite:///{tmp_path}/mlflow.db", "rayft", tmp_path))
    check_tracking(TrackerSpec("http://mlflow:5000", "rayft", tmp_path))


def test_the_skeleton_is_the_models(tiny_folder: Path) -> None:
    config = ModelConfig(name=str(tiny_folder))
    shapes, tokenizer, context = skeleton(config)
    loaded = load_model(config, torch.float32)
    assert shapes == linear_shapes(loaded.model)
    assert context == loaded.context
    assert tokenizer.pad_token_id is not None


def test_a_missing_file_names_the_packaged_ones() -> None:
    with pytest.raises(ConfigError, match=", ".join(sorted(packaged()))):
        load_config("nothing.yaml")


def test_relative_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["data={source: jsonl, name: d.jsonl, max_length: 64}", "model.name=base.gguf"]
    run = load_config("tiny", changes).run()
    assert run.data.name == str(tmp_path / "d.jsonl")
    assert run.model.name == str(tmp_path / "base.gguf")

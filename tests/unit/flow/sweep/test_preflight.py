"""Mistakes are found before anything starts, and lose nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rayft.errors import (
    ConfigError,
    DataError,
    ModelError,
    RayftError,
    ResourceError,
    TargetError,
    TrackingError,
)
from rayft.flow.cluster import check_tracking
from rayft.flow.config import PipelineConfig, load_config, packaged
from rayft.flow.sweep.preflight import described, preflight
from rayft.flow.sweep.run import patience_text
from rayft.models.load import ModelConfig, load_model, load_skeleton
from rayft.models.targets import linear_shapes
from rayft.tracking.base import TrackerSpec
from tests.unit.data.pictures import folder

pytestmark = pytest.mark.usefixtures("prepared")


def tiny(tmp_path: Path, *overrides: str) -> PipelineConfig:
    return load_config("tiny", [f"output={tmp_path / 'out'}", *overrides])


@pytest.mark.parametrize("name", sorted(packaged()))
def test_every_packaged_configuration_is_valid(name: str) -> None:
    config = load_config(name)
    assert config.name == name


def test_a_plan_has_all_settings_decided(tmp_path: Path) -> None:
    plan = preflight(tiny(tmp_path))
    assert len(plan.points) == 3
    assert plan.executor == "lane"
    assert plan.run.scale.device == "cpu"
    assert plan.tracker.experiment_id
    assert plan.identity.data
    assert (tmp_path / "out" / "config.yaml").is_file()
    again = load_config(tmp_path / "out" / "config.yaml")
    assert [p.key for p in preflight(again).points] == [p.key for p in plan.points]


@pytest.mark.parametrize(
    ("override", "error", "match"),
    [
        ("sweep.methods.lora.ranks=[40]", TargetError, r"rank 40 is above .* at most 16"),
        ("sweep.methods.lora.ranks=[4, 4]", ConfigError, "2 trials have the name lora-r4-"),
        ("sweep.methods.lora.targets=[]", ConfigError, "targets is empty; name at least one module"),
        ("optim.warmup=100", ConfigError, r"^optim\.warmup \(100\) must be at most optim\.steps \(8\)"),
        ("scale.workers=2", ConfigError, r"rows_per_step \(1\) must be a multiple of scale\.workers"),
        ("deepspeed={optimizer: {}}", ConfigError, "^deepspeed: optimizer is optim; set it there"),
        ("deepspeed={zero_optimisation: {}}", ConfigError, "DeepSpeed has no setting 'zero_optimisation'"),
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
def test_mistakes_are_found_before_anything_starts(
    tmp_path: Path, override: str, error: type[RayftError], match: str
) -> None:
    with pytest.raises(error, match=match):
        preflight(tiny(tmp_path, override))


def test_a_base_whose_examples_would_see_one_another_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    half = settings["hidden_size"] // settings["num_attention_heads"] // 2
    settings["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * half, "long_factor": [2.0] * half,
        "original_max_position_embeddings": 8,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(settings))
    expected = (
        r"LlamaForCausalLM uses other rotary frequencies .* 8 tokens .*; set data\.max_length to 8 or less"
    )
    with pytest.raises(ModelError, match=expected):
        preflight(tiny(tmp_path, f"model.name={base}"))
    preflight(tiny(tmp_path, f"model.name={base}", "data.packing=false"))


def test_raw_text_has_no_scores_that_could_decide(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"Box {number} is empty."}) for number in range(12)]
    (tmp_path / "boxes.jsonl").write_text("\n".join(rows))
    data = f"data={{source: jsonl, name: {tmp_path / 'boxes.jsonl'}, val: 2, test: 2}}"
    preflight(tiny(tmp_path, data))
    with pytest.raises(ConfigError, match=r"select_by is val_score, but raw text has no answers"):
        preflight(tiny(tmp_path / "other", data, "sweep.select_by=val_score"))


@pytest.mark.parametrize(
    ("settings", "before"),
    [
        # ASHA's rungs are at 2 and 4 of 8 steps.
        (["evaluate.patience=1"], None),
        (["evaluate.patience=2"], 2),
        (["evaluate.patience=2", "evaluate.every=3"], None),
        (["evaluate.patience=1", "evaluate.every=50", "sweep.grace=8"], 0),
        ([], None),
    ],
)
def test_patience_that_can_end_no_trial_is_reported(
    tmp_path: Path, settings: list[str], before: int | None
) -> None:
    text = patience_text(preflight(tiny(tmp_path, *settings)))
    assert (f"trials are evaluated {before} times before their last step" in text) == (before is not None)
    assert bool(text) == (before is not None)


@pytest.mark.parametrize(("words", "limit", "fits"), [(1, 4, True), (3000, 4, False), (1, 1020, False)])
def test_a_question_that_could_not_be_scored_is_found_before_anything_starts(
    tmp_path: Path, words: int, limit: int, fits: bool
) -> None:
    """Although texts that are too long to train on are dropped."""
    for part, count in (("train", 12), ("test", 3)):
        rows = [{"prompt": f"What is in box {part} {number}?", "completion": "5"} for number in range(count)]
        rows[-1]["prompt"] += " Look well." * (words if part == "test" else 1)
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = f"{{train: {tmp_path / 'train.jsonl'}, test: {tmp_path / 'test.jsonl'}}}"
    data = f"data={{source: jsonl, files: {files}, val: 2, max_length: 128, too_long: drop}}"
    config = tiny(tmp_path, data, f"evaluate.max_new_tokens={limit}")
    if fits:
        preflight(config)
        return
    with pytest.raises(DataError, match=rf"(val|test): the question '.*an answer of {limit}, so it can't"):
        preflight(config)


def test_a_sqlite_file_is_refused_on_several_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}, {"Alive": True}])
    with pytest.raises(TrackingError, match="start `mlflow server`"):
        check_tracking(TrackerSpec(f"sqlite:///{tmp_path}/mlflow.db", "rayft", tmp_path))
    check_tracking(TrackerSpec("http://mlflow:5000", "rayft", tmp_path))


def test_the_skeleton_is_the_models(tiny_folder: Path) -> None:
    config = ModelConfig(name=str(tiny_folder))
    shapes, tokenizer, context = described(config, load_skeleton(config))
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


def pets(tmp_path: Path, *overrides: str) -> PipelineConfig:
    root = tmp_path / "pets"
    if not root.exists():
        folder(root)
    settings = (
        f"output={tmp_path / 'out'}",
        f"data={{source: image_folder, name: {root}}}",
        "model={name: tiny-vit, task: image_classification, num_labels: 2}",
    )
    return load_config("tiny", [*settings, *overrides])


def test_a_sweep_over_images_is_planned(tmp_path: Path) -> None:
    plan = preflight(pets(tmp_path))
    assert plan.parts.labels == ("cat", "dog")
    assert plan.parts.has_images


@pytest.mark.parametrize(
    ("override", "error", "match"),
    [
        ("model.name=tiny-llama", ModelError, "can't load tiny-llama for image_classification"),
        ("model.num_labels=3", ConfigError, "2 classes .* set it to 2"),
        ("data.name=nowhere", DataError, "no folder at .*nowhere"),
        ("data.format=text", ConfigError, "does not fit image_folder"),
    ],
)
def test_mistakes_about_images_are_found_before_anything_starts(
    tmp_path: Path, override: str, error: type[RayftError], match: str
) -> None:
    with pytest.raises(error, match=match):
        preflight(pets(tmp_path, override))


def test_a_damaged_image_is_named_before_anything_starts(tmp_path: Path) -> None:
    config = pets(tmp_path)
    image = tmp_path / "pets" / "cat" / "3.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(DataError, match=r"cat/3\.png can't be read as an image"):
        preflight(config)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_skeleton_of_a_vision_model_is_the_models(quantize: str | None) -> None:
    config = ModelConfig.model_validate(
        {"name": "tiny-vit", "task": "image_classification", "quantize": quantize}
    )
    shapes, encoder, _ = described(config, load_skeleton(config))
    loaded = load_model(config, torch.float32)
    assert shapes == linear_shapes(loaded.model)
    assert encoder.channels == loaded.tokenizer.channels == 1

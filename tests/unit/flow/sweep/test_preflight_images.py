"""Sweeps over images pass the checks, and their mistakes are found there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayft.errors import ConfigError, DataError, ModelError, RayftError
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.sweep.preflight import preflight, skeleton
from rayft.models.load import ModelConfig, load_model
from rayft.models.targets import linear_shapes
from tests.unit.data.pictures import folder


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path_factory.mktemp("cache")))


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
def test_mistakes(tmp_path: Path, override: str, error: type[RayftError], match: str) -> None:
    with pytest.raises(error, match=match):
        preflight(pets(tmp_path, override))


def test_a_damaged_image_is_named_before_anything_starts(tmp_path: Path) -> None:
    config = pets(tmp_path)
    image = tmp_path / "pets" / "cat" / "3.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(DataError, match=r"cat/3\.png can't be read as an image"):
        preflight(config)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_skeleton_is_the_models(quantize: str | None) -> None:
    config = ModelConfig.model_validate(
        {"name": "tiny-vit", "task": "image_classification", "quantize": quantize}
    )
    shapes, encoder, _ = skeleton(config)
    loaded = load_model(config, torch.float32)
    assert shapes == linear_shapes(loaded.model)
    assert encoder.channels == loaded.tokenizer.channels == 1

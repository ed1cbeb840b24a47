"""`adapter_config.json` is read as PEFT reads it: fields left out, null, of another type, or unknown."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import shutil
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from rayft.artifacts import AdapterArtifact
from rayft.artifacts.lora_settings import LoraSettings
from rayft.errors import ArtifactError
from rayft.models.inject import attach
from rayft.numerics import assert_close, generator

CONFIG = "adapter_config.json"
IDS = torch.randint(0, 250, (2, 9), generator=generator("ids"))
DEFAULT_R = {"r": 8, "lora_alpha": 20, "target_modules": ["q_proj", "down_proj"]}
PATTERNS = {
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj", "mlp.up_proj"],
    "exclude_modules": ["layers.0.self_attn.q_proj"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
    "alpha_pattern": {"v_proj": 3, r".*\.1\..*up_proj": 5},
    "lora_dropout": 0.1,
}
REGEX = {"r": 8, "lora_alpha": 3, "target_modules": r".*layers\.1.*(q|up)_proj", "use_rslora": True}
SOURCES = {"default rank": DEFAULT_R, "patterns": PATTERNS, "regex": REGEX}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Path]:
    """LoRAs that PEFT made and saved, B not zero."""
    from transformers import AutoModelForCausalLM

    folders = {}
    for name, options in SOURCES.items():
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        model = get_peft_model(base, LoraConfig(**options, task_type="CAUSAL_LM"))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(0, 0.2, generator=generator("config", key))
        folders[name] = tmp_path_factory.mktemp("saved") / name.replace(" ", "-")
        model.save_pretrained(folders[name])
    return folders


def theirs(model: Any, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval())


def ours(model: Any, folder: Path) -> torch.Tensor:
    fresh = copy.deepcopy(model)
    attach(fresh, AdapterArtifact.load(folder))
    return logits(fresh)


def outcome(model: Any, folder: Path) -> torch.Tensor | str:
    """Return logits, or the reason why there are none."""
    try:
        return ours(model, folder)
    except ArtifactError as error:
        return str(error)


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    # Two layers of seven products each stand between tokens and logits.
    assert_close(one, other, torch.float32, 64, depth=16)


def changed(folder: Path, place: Path, change: dict[str, Any], drop: typing.Collection[str] = ()) -> Path:
    """Copy a folder with another configuration."""
    shutil.copytree(folder, place, dirs_exist_ok=True)
    config = json.loads((folder / CONFIG).read_text()) | change
    (place / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))
    return place


FIELDS = [field.name for field in dataclasses.fields(LoraConfig)]


def test_every_field_and_default_is_pefts() -> None:
    default, hints = LoraConfig(), typing.get_type_hints(LoraConfig, include_extras=True)
    declared = LoraSettings(peft_type="LORA")
    assert sorted(FIELDS) == sorted(LoraSettings.model_fields)
    for name in FIELDS:
        # PEFT fills its own version in, and drops the runtime configuration of a file.
        if name not in ("peft_type", "peft_version", "runtime_config"):
            assert getattr(declared, name) == getattr(default, name), name
        # PEFT asks the two patterns for their keys, and fails where they are None.
        if name not in ("rank_pattern", "alpha_pattern", "runtime_config", "peft_type"):
            assert (type(None) in typing.get_args(hints[name])) == (
                type(None) in typing.get_args(LoraSettings.model_fields[name].annotation)
            ), name


DECIDES = {
    "peft_type",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "r",
    "rank_pattern",
}
"""Fields that say which modules there are, and of which rank; the tensors have to agree with them."""


def left_out(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """Each field alone, and random subsets of them."""
    draw = random.Random(0)
    subsets = [tuple(draw.sample(sorted(config), draw.randint(2, len(config) - 1))) for _ in range(25)]
    return [*((name,) for name in config), *subsets]


@pytest.mark.parametrize("name", SOURCES)
def test_fields_that_are_left_out_have_pefts_defaults(
    saved: dict[str, Path], tiny_model: Any, tmp_path: Path, name: str
) -> None:
    config = json.loads((saved[name] / CONFIG).read_text())
    loaded = 0
    for number, drop in enumerate(left_out(config)):
        folder = changed(saved[name], tmp_path / str(number), {}, drop)
        found = outcome(tiny_model, folder)
        if isinstance(found, str):
            assert DECIDES & {*drop}, found
            assert CONFIG in found
        else:
            loaded += 1
            same(found, theirs(tiny_model, folder))
    assert loaded > len(config) - 5


def test_the_default_alpha_is_eight_whatever_the_rank(tiny_model: Any, tmp_path: Path) -> None:
    base = get_peft_model(copy.deepcopy(tiny_model), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for key, parameter in base.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(0, 0.2, generator=generator("alpha", key))
    base.save_pretrained(tmp_path / "saved")
    text = (
        '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "down_proj"]}'
    )
    (tmp_path / "saved" / CONFIG).write_text(text)
    artifact = AdapterArtifact.load(tmp_path / "saved")
    assert {factors.scale for factors in artifact.modules.values()} == {8 / 4}
    same(ours(tiny_model, tmp_path / "saved"), theirs(tiny_model, tmp_path / "saved"))


VALUES = (None, "8", 8.0, True, -1, 0, math.nan, 10**400, [], {}, ["x"], {"x": 1})


@pytest.mark.parametrize("field", FIELDS)
def test_other_values_are_refused_by_name_or_mean_what_peft_makes_of_them(
    saved: dict[str, Path], tiny_model: Any, tmp_path: Path, field: str
) -> None:
    for number, value in enumerate(VALUES):
        folder = changed(saved["patterns"], tmp_path / str(number), {field: value})
        found = outcome(tiny_model, folder)
        if isinstance(found, str):
            # A value of the right type may choose other modules and ranks than there are tensors of.
            assert field in found or field in DECIDES, (value, found)
        else:
            same(found, theirs(tiny_model, folder))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_text_that_is_no_regular_expression(saved: dict[str, Path], tmp_path: Path, field: str) -> None:
    value: Any = {"(": 4} if "pattern" in field else "("
    drop = ("layers_to_transform", "layers_pattern")
    folder = changed(saved["patterns"], tmp_path / "bad", {field: value}, drop)
    with pytest.raises(ArtifactError, match=rf"{field} has '\(', which is no regular expression"):
        AdapterArtifact.load(folder)


def test_unknown_fields(saved: dict[str, Path], tiny_model: Any, tmp_path: Path) -> None:
    source = saved["default rank"]
    nothing = {"new_in_peft_1": None, "new_switch": False, "new_list": []}
    same(ours(tiny_model, changed(source, tmp_path / "a", nothing)), theirs(tiny_model, source))
    with pytest.raises(ArtifactError, match=r"no field 'lora_alhpa'.*did you mean 'lora_alpha'"):
        AdapterArtifact.load(changed(source, tmp_path / "b", {"lora_alhpa": 32}))
    with pytest.raises(ArtifactError, match=r"no field 'use_better_lora'\. If a newer PEFT wrote it"):
        AdapterArtifact.load(changed(source, tmp_path / "c", {"use_better_lora": True}))


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", "mica", False])
def test_starts_that_leave_the_base_alone(
    saved: dict[str, Path], tiny_model: Any, tmp_path: Path, init: Any
) -> None:
    folder = changed(saved["default rank"], tmp_path / "a", {"init_lora_weights": init})
    same(ours(tiny_model, folder), theirs(tiny_model, folder))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"{", "is not valid JSON"),
        (b"[]", "holds no mapping"),
        (b"null", "holds no mapping"),
        (b"", "is not valid JSON"),
        (b"{}", "has no peft_type"),
        ('{"peft_type": "LORA"}'.encode("utf-16"), "is not valid JSON"),
        (b'{"peft_type": "LORA", "a": "\xff"}', "is not valid JSON"),
        (b'{"peft_type": "LORA", "revision": "\\ud83d"}', "half a surrogate pair"),
        (b'{"peft_type": "LORA", "rank_pattern": {"\\udc00": 4}}', "half a surrogate pair"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (
            b'{"peft_type": "LORA", "auto_mapping": ' + b'{"a":' * 600 + b"1" + b"}" * 601,
            "auto_mapping|nested",
        ),
    ],
)
def test_files_that_are_no_configuration(
    saved: dict[str, Path], tmp_path: Path, text: bytes, match: str
) -> None:
    folder = changed(saved["default rank"], tmp_path / "a", {})
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(ArtifactError, match=match):
        AdapterArtifact.load(folder)

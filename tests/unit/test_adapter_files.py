"""Adapter files of other programs: more than LoRA factors, names that PEFT does not write, other types."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, BaseMismatchError
from rayft.flow.squeeze.request import squeeze_request
from rayft.flow.squeeze.run import squeeze_folder
from rayft.flow.target import Place
from rayft.models.inject import attach
from rayft.serving.control.admission import check_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def by_peft(model: Any, folder: Path, **options: Any) -> Path:
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    get_peft_model(copy.deepcopy(model), LoraConfig(**(settings | options))).save_pretrained(folder)
    return folder


def rewritten(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def refused_everywhere(folder: Path, match: str) -> None:
    """Check the error of the function that loading, serving and squeezing share."""
    out = folder.parent / "out"
    with pytest.raises(ArtifactError, match=match):
        AdapterArtifact.load(folder)
    with pytest.raises(ArtifactError, match=match):
        check_adapter("a", str(folder), None)
    with pytest.raises(ArtifactError, match=match):
        squeeze_folder(squeeze_request(Place(str(folder), folder, None), out, ranks=[2]), Console(quiet=True))
    assert not out.exists()


OUTSIDE: dict[str, tuple[dict[str, Any], str]] = {
    "lm_head saved": ({"modules_to_save": ["lm_head"]}, "trains lm_head whole"),
    "embeddings saved": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        "trains embed_tokens, lm_head whole",
    ),
    "norms saved": ({"modules_to_save": ["input_layernorm"]}, "trains input_layernorm whole"),
    "no task": (
        {"modules_to_save": ["embed_tokens"], "task_type": None},
        r"trains model\.embed_tokens whole",
    ),
    "lm_head without a task": (
        {"modules_to_save": ["lm_head"], "task_type": None},
        "trains lm_head whole",
    ),
    "LoRA on lm_head": ({"target_modules": ["q_proj", "lm_head"]}, r"trains lm_head \(LoRA\)"),
    "LoRA on embeddings": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        r"the embedding model\.embed_tokens \(LoRA\)",
    ),
    "token rows": ({"trainable_token_indices": [1, 2]}, "trains rows of an embedding"),
    "biases": ({"bias": "all"}, "trains biases"),
    "biases of LoRA": ({"bias": "lora_only"}, "trains biases"),
    "parameters": (
        {"target_parameters": ["mlp.up_proj.weight"]},
        r"trains mlp\.up_proj\.weight \(target_parameters\)",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", OUTSIDE)
def test_trained_parameters_besides_the_factors_are_an_error_that_names_them(
    tiny_model: Any, tmp_path: Path, kind: str
) -> None:
    options, match = OUTSIDE[kind]
    folder = by_peft(tiny_model, tmp_path / "peft", **options)
    refused_everywhere(folder, rf"{match}.*not supported|trains biases")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("options", "undo", "match"),
    [
        ({"trainable_token_indices": [1]}, {"trainable_token_indices": None}, "rows of the embedding model"),
        ({"bias": "all"}, {"bias": "none"}, "trains model|the bias of"),
        ({"use_dora": True}, {"use_dora": False}, r"the magnitude of .*q_proj \(DoRA\)"),
        ({"lora_bias": True}, {"lora_bias": False}, r"the bias of .*q_proj \(lora_bias\)"),
    ],
)
def test_what_only_the_tensors_show_is_an_error_that_names_it(
    tiny_model: Any, tmp_path: Path, options: dict[str, Any], undo: dict[str, Any], match: str
) -> None:
    for layer in tiny_model.modules():
        if isinstance(layer, nn.Linear):
            layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    folder = by_peft(tiny_model, tmp_path / "peft", **options)
    rewritten(folder, **undo)
    refused_everywhere(folder, match)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_embeddings_that_were_resized_are_named(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model.resize_token_embeddings(300)
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    refused_everywhere(tmp_path / "peft", r"trains .*model\.embed_tokens whole.*not supported")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_convolution_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["0"])).save_pretrained(
        tmp_path / "peft"
    )
    refused_everywhere(tmp_path / "peft", r"trains 0, a convolution")


NAMES = {
    "twice": (lambda key: PREFIX + key, "begins with 'base_model.model.' once"),
    "never": (lambda key: key.removeprefix(PREFIX), "begins with 'base_model.model.' once"),
    "module.": (lambda key: f"module.{key}", "begins with 'base_model.model.' once"),
    "a name of its own": (lambda key: key.replace(".weight", ".mine.weight"), "is no LoRA factor"),
    "a typing error": (
        lambda key: key.replace("q_proj", "q_prj"),
        r"factors of .*q_prj, which .* not choose",
    ),
    "vLLM's": (lambda key: key.replace("q_proj", "qkv_proj"), r"factors of .*qkv_proj, which .* not choose"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_tensors_whose_names_peft_would_ignore_are_an_error(
    tiny_model: Any, tmp_path: Path, kind: str
) -> None:
    change, match = NAMES[kind]
    folder = by_peft(tiny_model, tmp_path / "peft")
    save_file({change(key): value for key, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    refused_everywhere(folder, match)


def test_pefts_own_name_of_an_adapter_may_stand_in_its_tensors(tiny_model: Any, tmp_path: Path) -> None:
    folder = by_peft(tiny_model, tmp_path / "peft")
    plain, tensors = AdapterArtifact.load(folder), load_file(folder / WEIGHTS)
    named = {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
    save_file(named, folder / WEIGHTS)
    assert AdapterArtifact.load(folder).content_hash == plain.content_hash
    theirs = PeftModel.from_pretrained(tiny_model, str(folder))
    first = theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.equal(first, plain.modules["model.layers.0.self_attn.q_proj"].a)
    save_file({key: value.clone() for key, value in (named | tensors).items()}, folder / WEIGHTS)
    with pytest.raises(ArtifactError, match="is there twice"):
        AdapterArtifact.load(folder)


def test_a_file_that_lacks_modules_is_refused_where_the_base_is_known(
    tiny_model: Any, tmp_path: Path
) -> None:
    folder = by_peft(tiny_model, tmp_path / "peft")
    tensors = load_file(folder / WEIGHTS)
    save_file({key: value for key, value in tensors.items() if "layers.1" not in key}, folder / WEIGHTS)
    with pytest.raises(BaseMismatchError, match=r"no factors of model\.layers\.1\.self_attn\.q_proj, which"):
        attach(tiny_model, AdapterArtifact.load(folder))


def write(folder: Path, kind: str, size: float) -> None:
    """Write a safetensors file by hand, in a type of `size` bytes that torch may lack."""
    header: dict[str, Any] = {}
    place = 0
    for key, value in load_file(folder / WEIGHTS).items():
        length = int(value.numel() * size)
        header[key] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [place, place + length]}
        place += length
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(place))


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("F8_E4M3", 1),
        ("F8_E5M2", 1),
        ("F8_E8M0", 1),
        ("F4", 0.5),
        ("F6_E2M3", 0.75),
        ("I8", 1),
        ("U8", 1),
        ("BOOL", 1),
        ("U16", 2),
        ("I32", 4),
        ("I64", 8),
        ("C64", 8),
        ("F128", 16),
    ],
)
def test_types_that_are_not_supported_are_an_error(
    tiny_model: Any, tmp_path: Path, kind: str, size: float
) -> None:
    folder = by_peft(tiny_model, tmp_path / "peft")
    write(folder, kind, size)
    key = next(iter(load_file_keys(folder)))
    refused_everywhere(folder, rf"{WEIGHTS}: {key} is of type {kind}.*save it again in one of these")


def load_file_keys(folder: Path) -> list[str]:
    data = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return list(json.loads(data[8 : 8 + size]))


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16"])
def test_supported_types_are_read(tiny_model: Any, tmp_path: Path, kind: str) -> None:
    folder = by_peft(tiny_model, tmp_path / "peft")
    write(folder, kind, {"F64": 8, "F32": 4}.get(kind, 2))
    assert not next(iter(AdapterArtifact.load(folder).modules.values())).b.any()


def test_any_damage_to_the_header_is_an_artifact_error(tiny_model: Any, tmp_path: Path) -> None:
    folder = by_peft(tiny_model, tmp_path / "peft")
    data, draw = (folder / WEIGHTS).read_bytes(), torch.Generator().manual_seed(0)
    (size,) = struct.unpack("<Q", data[:8])
    spoilt = [data[:length] for length in (0, 1, 7, 8, 9, 40, 8 + size, len(data) - 1)]
    spoilt += [
        struct.pack("<Q", length) + data[8:] for length in (0, 1, size - 1, size + 1, 2**40, 2**64 - 1)
    ]
    spoilt += [struct.pack("<Q", len(text)) + text for text in (b"[]", b"1", b"{}", b'{"a": 1}', b"[" * 9000)]
    for _ in range(150):
        at, value = (int(torch.randint(0, most, (1,), generator=draw)) for most in (8 + size, 256))
        spoilt.append(data[:at] + bytes([value]) + data[at + 1 :])
    for content in spoilt:
        (folder / WEIGHTS).write_bytes(content)
        try:
            AdapterArtifact.load(folder)
        except ArtifactError as error:
            assert str(folder) in str(error)  # noqa: PT017


def test_a_larger_vocabulary_is_an_error_that_says_so(
    tiny_model: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.up_proj.weight += 0.1
    tiny_model.resize_token_embeddings(262)
    tiny_model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(
        BaseMismatchError,
        match=r"embed_tokens\.weight has 262 tokens.* has 258.*resize_token_embeddings\(262\)",
    ):
        squeeze_folder(
            squeeze_request(
                Place("tuned", tmp_path / "tuned", None), tmp_path / "out", ranks=[2], base=str(tiny_folder)
            ),
            Console(quiet=True),
        )

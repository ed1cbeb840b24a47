"""Merged models answer as the adapter does, and what rounding loses is measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import BaseMismatchError, ModelError
from rayft.methods.base import LoraFactors
from rayft.models import merge as merging
from rayft.models.inject import attach
from rayft.models.load import ModelConfig, load_model, load_skeleton
from rayft.models.merge import Rounding, merge, merged_bytes
from rayft.models.targets import is_transposed, linear_shapes
from rayft.models.tiny import TINY
from rayft.numerics import assert_close, generator, relative_error

LENGTH = 200
"""Terms of a logit's sums: layers, widths and inner sizes of the tiny models."""
DEPTH = 30
"""Roundings on the way to a logit."""
TOKENS = torch.tensor([[5, 80, 17, 121, 9, 33]])


def adapter(
    base: ModelConfig, chosen: Sequence[str] = (), size: float = 0.1, rank: int = 4
) -> AdapterArtifact:
    """Return a random adapter of all linear layers, or those whose paths end so: each with its own rank."""
    modules, skeleton = {}, load_skeleton(base)
    for index, (name, (outputs, inputs)) in enumerate(linear_shapes(skeleton).items()):
        if chosen and not name.endswith(tuple(chosen)):
            continue
        draw, own = generator(0, name), rank + index % 2
        a = torch.randn(own, inputs, generator=draw)
        b = size * torch.randn(outputs, own, generator=draw)
        modules[name] = LoraFactors(a, b, 0.5 + index % 3)
    turned = any(is_transposed(skeleton.get_submodule(name)) for name in modules)
    meta = ArtifactMeta(task=base.task, base_model=base.name, transposed=turned)
    return AdapterArtifact(modules, meta=meta)


def merged(artifact: AdapterArtifact, base: ModelConfig, folder: Path) -> Rounding:
    folder.mkdir()
    return merge(artifact, base, load_skeleton(base), folder)


def in_16_bits(folder: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(dtype).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-qwen", "tiny-gpt2"])
def test_a_merged_model_has_the_logits_of_the_adapter(kind: str, tmp_path: Path) -> None:
    base = ModelConfig(name=str(TINY[kind](tmp_path / "base")))
    artifact = adapter(base)
    rounding = merged(artifact, base, tmp_path / "merged")
    assert rounding.dtype == "float32"
    assert rounding.total < torch.finfo(torch.float32).eps * 100
    saved = artifact.save(tmp_path / "adapter")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name), saved)(
        TOKENS
    ).logits
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(TOKENS).logits
    assert_close(actual, expected, torch.float32, LENGTH, DEPTH)
    # The adapter does something that the test would miss without it.
    plain = AutoModelForCausalLM.from_pretrained(base.name)(TOKENS).logits
    assert relative_error(actual, plain) > 0.1
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("hi") is not None


def test_weights_that_are_not_adapted_and_all_other_files_are_copied(
    tiny_folder: Path, tmp_path: Path
) -> None:
    base = ModelConfig(name=str(tiny_folder))
    merged(adapter(base, ["q_proj"]), base, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    for path in tiny_folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_of_small_updates_is_measured(
    dtype: torch.dtype, tiny_folder: Path, tmp_path: Path
) -> None:
    base = ModelConfig(name=str(in_16_bits(tiny_folder, tmp_path / "base", dtype)))
    artifact = adapter(base, ["q_proj", "down_proj"], size=1e-3)
    rounding = merged(artifact, base, tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    lost = update = 0.0
    for name, factors in artifact.modules.items():
        old, new = before[f"{name}.weight"].double(), after[f"{name}.weight"]
        assert new.dtype == dtype
        delta = factors.scale * factors.b.double() @ factors.a.double()
        assert_close(new, old + delta, dtype, 1)
        error = delta - (new.double() - old)
        own = float(error.norm() / delta.norm())
        assert_close(torch.tensor(rounding.modules[name]), torch.tensor(own), torch.float32, 64)
        lost, update = lost + float(error.square().sum()), update + float(delta.square().sum())
    assert_close(torch.tensor(rounding.total), torch.tensor((lost / update) ** 0.5), torch.float32, 4096)
    assert rounding.modules[rounding.worst] == max(rounding.modules.values())
    if dtype == torch.bfloat16:
        assert rounding.total > 0.05, "this update is small enough to lose a part of itself"


def test_the_sum_is_rounded_once(tiny_folder: Path, tmp_path: Path) -> None:
    base = ModelConfig(name=str(in_16_bits(tiny_folder, tmp_path / "base")))
    artifact = adapter(base, ["q_proj"], size=1.0)
    merged(artifact, base, tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    for name, factors in artifact.modules.items():
        exact = before[f"{name}.weight"].double() + factors.scale * factors.b.double() @ factors.a.double()
        nearest = relative_error(exact.to(torch.bfloat16), exact)
        assert relative_error(after[f"{name}.weight"], exact) <= nearest * (
            1 + torch.finfo(torch.bfloat16).eps
        )


def test_a_large_model_is_written_in_several_files(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ModelConfig(name=str(tiny_folder))
    artifact = adapter(base)
    merged(artifact, base, tmp_path / "one")
    monkeypatch.setattr(merging, "SHARD", "50KB")
    monkeypatch.setattr(merging, "BLOCK", 100)
    merged(artifact, base, tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) == 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert {path.name for path in files} == {*index["weight_map"].values()}
    # A sharded base is read as well.
    again = ModelConfig(name=str(tmp_path / "many"))
    twice = merged(artifact, again, tmp_path / "twice")
    assert twice.modules.keys() == artifact.modules.keys()
    whole = load_file(tmp_path / "one" / "model.safetensors")
    many = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert whole.keys() == many.keys()
    for name, tensor in whole.items():
        assert_close(many[name], tensor, torch.float32, LENGTH)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "many")(TOKENS).logits.isfinite().all()


def test_a_base_of_the_hub_is_merged_from_its_cache(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub" / "models--org--model"
    shutil.copytree(tiny_folder, hub / "snapshots" / ("a" * 40))
    # Not every model has one, and without a connection nobody can know.
    (hub / "snapshots" / ("a" * 40) / "generation_config.json").unlink()
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = ModelConfig(name="org/model")
    artifact = adapter(base)
    merged(artifact, base, tmp_path / "merged")
    merged(artifact, ModelConfig(name=str(tiny_folder)), tmp_path / "expected")
    names = {path.name for path in tiny_folder.iterdir()} - {"generation_config.json"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    for name in names:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_a_tied_output_layer_stays_tied(tiny_folder: Path, tmp_path: Path) -> None:
    base = ModelConfig(name=str(tiny_folder))
    merged(adapter(base), base, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_base_that_only_transformers_can_read_is_merged_in_memory(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ModelConfig(name=str(in_16_bits(tiny_folder, tmp_path / "base")))
    # Loading sets the padding token in memory; the merged model keeps the base's configuration.
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**settings, "pad_token_id": None}))
    artifact = adapter(base)
    expected = merged(artifact, base, tmp_path / "expected")
    # As for files whose names for tensors differ from the model's.
    monkeypatch.setattr(merging, "weight_files", lambda config, model: None)
    rounding = merged(artifact, base, tmp_path / "merged")
    assert rounding.modules == expected.modules
    assert rounding.dtype == expected.dtype
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "merged"))
    for name, value in before.items():
        if name != "lm_head.weight":
            assert torch.equal(after[name], value)
    kept, made = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "merged"))
    assert made == kept
    with pytest.raises(BaseMismatchError, match="was made for the base"):
        merged(
            AdapterArtifact(artifact.modules, meta=ArtifactMeta(base_fingerprint="0" * 16)),
            base,
            tmp_path / "no",
        )


@pytest.mark.parametrize(
    ("kind", "task"), [("tiny-bert", "sequence_classification"), ("tiny-vit", "image_classification")]
)
def test_a_classifier_is_merged_with_its_head(kind: str, task: Any, tmp_path: Path) -> None:
    base = ModelConfig(name=str(TINY[kind](tmp_path / "base")), task=task, num_labels=3)
    loaded = load_model(base, torch.float32).model
    plain = adapter(base)
    heads = {
        name: torch.randn(value.shape, generator=generator(1, name))
        for name, value in loaded.named_parameters()
        if name.startswith("classifier.")
    }
    artifact = AdapterArtifact(plain.modules, heads, plain.meta)
    merged(artifact, base, tmp_path / "merged")
    attach(loaded, artifact)
    found = type(loaded).from_pretrained(tmp_path / "merged")
    assert found.config.num_labels == 3
    if kind == "tiny-vit":
        given: dict[str, Any] = {"pixel_values": torch.randn(2, 1, 8, 8)}
    else:
        given = {"input_ids": TOKENS}
    assert_close(found(**given).logits, loaded(**given).logits, torch.float32, LENGTH, DEPTH)
    for path in (tmp_path / "base").glob("*tokenizer*"):
        assert (tmp_path / "merged" / path.name).is_file()
    if kind == "tiny-vit":
        assert (tmp_path / "merged" / "preprocessor_config.json").is_file()


def test_a_classifier_keeps_the_type_of_its_base(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    TINY["tiny-bert"](tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base = ModelConfig(name=str(tmp_path / "base"), task="sequence_classification")
    rounding = merged(adapter(base, size=1e-3), base, tmp_path / "merged")
    assert rounding.dtype == "bfloat16"
    assert rounding.total > 0.01
    kinds = {value.dtype for value in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_update_of_zero_loses_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    base = ModelConfig(name=str(tiny_folder))
    rounding = merged(adapter(base, ["q_proj"], size=0.0), base, tmp_path / "merged")
    assert rounding.total == 0.0
    assert set(rounding.modules.values()) == {0.0}


def test_another_base_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    base = ModelConfig(name=str(tiny_folder))
    artifact = adapter(base)
    other = ModelConfig(name=str(TINY["tiny-qwen"](tmp_path / "qwen")))
    with pytest.raises(BaseMismatchError, match="use it with its own base"):
        merged(artifact, other, tmp_path / "a")
    stamped = AdapterArtifact(artifact.modules, meta=ArtifactMeta(base_fingerprint="0" * 16))
    with pytest.raises(BaseMismatchError, match="was made for the base"):
        merged(stamped, base, tmp_path / "b")


def test_sums_that_the_type_of_the_base_does_not_hold_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    base = ModelConfig(name=str(in_16_bits(tiny_folder, tmp_path / "base", torch.float16)))
    with pytest.raises(ModelError, match=r"holds NaN or Inf once it is rounded to torch\.float16"):
        merged(adapter(base, ["q_proj"], size=1e5), base, tmp_path / "merged")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="holds NaN or Inf in the base"):
        merged(adapter(base, ["q_proj"]), base, tmp_path / "damaged")


def test_a_weight_of_two_modules_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    base = ModelConfig(name=str(tiny_folder))
    skeleton = load_skeleton(base)
    first, second = (layer.self_attn for layer in skeleton.model.layers)
    second.q_proj.weight = first.q_proj.weight
    with pytest.raises(BaseMismatchError, match="are one weight in the base"):
        merge(adapter(base, ["q_proj"]), base, skeleton, tmp_path)
    assert isinstance(first.q_proj, nn.Linear)


def test_the_size_of_a_base_is_that_of_its_files(tiny_folder: Path) -> None:
    size = (tiny_folder / "model.safetensors").stat().st_size
    assert merged_bytes(ModelConfig(name=str(tiny_folder))) == size


def test_an_adapter_of_peft_with_patterns_is_merged_as_peft_merges_it(
    tiny_folder: Path, tiny_model: Any, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=8, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 4}, alpha_pattern={"down_proj": 3}, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(tiny_model, config)
    model.save_pretrained(tmp_path / "adapter")
    base = ModelConfig(name=str(tiny_folder))
    merged(AdapterArtifact.load(tmp_path / "adapter"), base, tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    for name, value in model.merge_and_unload().named_parameters():
        assert_close(after[name], value, torch.float32, 8, 3)


def test_a_classifier_is_merged_without_progress_bars(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = ModelConfig(name=str(TINY["tiny-bert"](tmp_path / "base")), task="sequence_classification")
    artifact = adapter(base, ["query"])
    capfd.readouterr()
    merged(artifact, base, tmp_path / "merged")
    assert capfd.readouterr() == ("", "")


def test_a_tensor_that_the_index_names_and_no_file_has_is_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    # Numbers that are no weights are copied as they are.
    tensors["position_ids"] = torch.arange(7)
    save_file(tensors, base / "part.safetensors", metadata={"format": "pt"})
    (base / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = ModelConfig(name=str(base))
    artifact = adapter(config, ["q_proj"])
    assert merged(artifact, config, tmp_path / "merged").dtype == "float32"
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(after["position_ids"], torch.arange(7))
    index["weight_map"]["gone"] = "part.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="gone"):
        merged(artifact, config, tmp_path / "other")

"""Adapters go into, out of and back into every shape of model, and PEFT loads them on it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, PeftModel

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.methods.base import MethodConfig
from rayft.models.heads import head_parameters, reset_heads
from rayft.models.inject import attach, clear, export, inject
from rayft.models.load import ModelConfig, load_model
from rayft.models.targets import heads, linears
from rayft.models.tiny import TINY
from rayft.numerics import assert_close, generator
from rayft.peft.folder import PeftFolder, load_adapter

TASKS = {"tiny-bert": "sequence_classification", "tiny-vit": "image_classification"}
WIDEST = 64
"""Terms of the longest sum in the tiny models."""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(pixel_values=torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)).logits
        return model(input_ids=torch.arange(8, 40).reshape(2, 16)).logits


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    # Two layers of seven products each stand between inputs and logits.
    assert_close(one, other, torch.float32, WIDEST, depth=16)


def move(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.empty(parameter.shape).normal_(0, 0.1, generator=generator("move", name))


def loaded_by_peft(model: Any, folder: Path) -> Any:
    """Load a folder by PEFT, which must have nothing to say about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(model, str(folder)).eval()


def goes_round(model: Any, fresh: Any, task: str, config: MethodConfig, folder: Path) -> AdapterArtifact:
    """Inject, train a little, export; attached here and loaded by PEFT it must be the same model."""
    plain, start = copy.deepcopy(fresh), logits(model)
    inject(model, config, seed=1)
    assert torch.equal(logits(model), start)
    move(model)
    ours = logits(model)
    assert (ours - start).norm() > start.norm() / 100
    export(model, ArtifactMeta(method=config.name, task=task)).save(folder)
    artifact = AdapterArtifact.load(folder)
    attach(fresh, artifact)
    same(logits(fresh), ours)
    same(logits(loaded_by_peft(plain, folder)), ours)
    return artifact


@pytest.mark.parametrize("method", ["lora", "paca", "c3la"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_every_tiny_model(name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path))
    task = TASKS.get(name, "causal_lm")
    chosen = ModelConfig.model_validate({"name": name, "task": task})
    model, fresh = (load_model(chosen, torch.float32).model for _ in range(2))
    before = copy.deepcopy(model.state_dict())
    artifact = goes_round(model, fresh, task, MethodConfig(name=method, rank=3), tmp_path / "adapter")
    assert artifact.meta.transposed == (name == "tiny-gpt2")
    assert artifact.meta.task == task
    clear(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
CLASSIFIERS: dict[str, tuple[Any, dict[str, int], set[str]]] = {
    "roberta": (transformers.RobertaConfig, SMALL, {"classifier"}),
    "deberta": (transformers.DebertaV2Config, SMALL, {"classifier", "pooler"}),
    "distilbert": (
        transformers.DistilBertConfig,
        {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40},
        {"pre_classifier", "classifier"},
    ),
    "modernbert": (transformers.ModernBertConfig, SMALL, {"head", "classifier"}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 24, "n_layer": 2, "n_head": 3}, {"score"}),
}


def classifier(name: str) -> Any:
    kind, sizes, _ = CLASSIFIERS[name]
    tokens = dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1
    )
    config = kind(vocab_size=64, num_labels=3, **sizes, **tokens)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_heads_of_any_name_train_whole_and_travel(name: str, tmp_path: Path) -> None:
    model, fresh = classifier(name), classifier(name)
    found = CLASSIFIERS[name][2]
    assert set(heads(model)) == found
    assert not [path for path in linears(model) if path.split(".")[0] in found]
    inject(model, MethodConfig(rank=2), seed=0)
    trains = {path.split(".")[0] for path, value in model.named_parameters() if value.requires_grad}
    assert trains >= found
    artifact = goes_round(
        classifier(name), fresh, "sequence_classification", MethodConfig(rank=2), tmp_path / "adapter"
    )
    assert {head.split(".")[0] for head in artifact.heads} == found


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_peft_loads_its_own_adapter_with_a_head_of_several_modules(name: str, tmp_path: Path) -> None:
    model, fresh = classifier(name), classifier(name)
    classifier(name).save_pretrained(tmp_path / "base")
    config = MethodConfig(name="peft:DoRA", rank=2)
    inject(model, config, seed=1)
    move(model)
    meta = ArtifactMeta(method="peft:DoRA", task="sequence_classification", base_model=str(tmp_path / "base"))
    folder = export(model, meta).save(tmp_path / "adapter")
    loaded = load_adapter(folder)
    assert isinstance(loaded, PeftFolder)
    assert loaded.config["modules_to_save"] == sorted(CLASSIFIERS[name][2])
    assert loaded.heads.keys() == head_parameters(model).keys()
    same(logits(loaded_by_peft(classifier(name), folder)), logits(model))
    by_name = AutoPeftModelForSequenceClassification.from_pretrained(str(folder), num_labels=3).eval()
    same(logits(by_name), logits(model))
    attach(fresh, loaded)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_fresh_heads_let_gradients_through(name: str) -> None:
    model = classifier(name)
    reset_heads(model, seed=3)
    once = logits(model)
    inject(model, MethodConfig(rank=2), seed=3)
    torch.nn.functional.cross_entropy(
        model(input_ids=torch.arange(8, 40).reshape(2, 16)).logits, torch.tensor([0, 1])
    ).backward()
    updates = [p.grad for path, p in model.named_parameters() if path.endswith("lora_B")]
    assert all(bool(grad.any()) for grad in updates)
    reset_heads(model, seed=3)
    assert torch.equal(logits(model), once)

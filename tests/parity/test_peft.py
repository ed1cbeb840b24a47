"""PEFT itself loads what is exported, and what PEFT saves loads here; both give the same logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import ArtifactError
from rayft.methods import METHODS
from rayft.methods.base import AdapterLinear, LoraFactors, MethodConfig
from rayft.methods.lora import LoraAdapter
from rayft.models.inject import attach, export, inject
from rayft.numerics import assert_close, generator

IDS = torch.randint(0, 250, (2, 9), generator=generator("ids"))
HIDDEN = 64


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    # Two layers of seven products each stand between tokens and logits.
    assert_close(one, other, torch.float32, HIDDEN, depth=16)


def move(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.empty(parameter.shape).normal_(0, 0.2, generator=generator("move", name))


def loaded_by_peft(model: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.exports_lora])
def test_peft_gives_the_same_logits(tiny_model: Any, tmp_path: Path, name: str, rslora: bool) -> None:
    plain = copy.deepcopy(tiny_model)
    base = logits(tiny_model)
    inject(tiny_model, MethodConfig(name=name, rank=3, alpha=4.0, rslora=rslora), seed=1)
    same(logits(tiny_model), base)
    move(tiny_model)
    ours = logits(tiny_model)
    assert (ours - base).norm() > base.norm() * torch.finfo(torch.float32).eps * 1000
    folder = export(tiny_model, ArtifactMeta(method=name)).save(tmp_path / "adapter")
    same(logits(loaded_by_peft(plain, folder)), ours)


def test_mixed_ranks_and_scales(tiny_model: Any, tmp_path: Path) -> None:
    plain = copy.deepcopy(tiny_model)
    modules = {}
    for index, (name, layer) in enumerate(
        (n, m) for n, m in tiny_model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ):
        rank, draw = 1 + index % 4, generator("mixed", name)
        a = torch.empty(rank, layer.in_features).normal_(generator=draw)
        b = torch.empty(layer.out_features, rank).normal_(generator=draw)
        modules[name] = LoraFactors(a, b, scale=(0.1, 1 / 3, 0.25)[index % 3])
    folder = AdapterArtifact(modules).save(tmp_path / "adapter")
    peft = loaded_by_peft(plain, folder)
    for name, factors in modules.items():
        layer = peft.base_model.model.get_submodule(name)
        assert layer.r["default"] == factors.rank
        assert layer.scaling["default"] == pytest.approx(factors.scale)
    attach(tiny_model, AdapterArtifact.load(folder))
    same(logits(tiny_model), logits(peft))


def from_peft(model: Any, folder: Path, **options: Any) -> Any:
    """A PEFT LoRA, trained a little and saved by PEFT."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **options)
    wrapped = get_peft_model(model, config)
    move(wrapped)
    wrapped.save_pretrained(str(folder))
    return wrapped.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 1}, "alpha_pattern": {"v_proj": 1}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 5}},
        {"init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "patterns", "rslora-patterns", "gaussian"],
)
def test_what_peft_saves_loads_here(tiny_model: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = from_peft(copy.deepcopy(tiny_model), tmp_path / "peft", **options)
    artifact = AdapterArtifact.load(tmp_path / "peft")
    attach(tiny_model, artifact)
    same(logits(tiny_model), logits(theirs))
    # Through our own folder and back into PEFT: rsLoRA is folded into α there.
    plain = copy.deepcopy(tiny_model.get_submodule(""))
    for name, layer in [(n, m) for n, m in plain.named_modules() if isinstance(m, AdapterLinear)]:
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = layer.weight
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, linear)
    again = loaded_by_peft(plain, artifact.save(tmp_path / "ours"))
    same(logits(again), logits(theirs))


def test_dora_saved_by_peft_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    from_peft(tiny_model, tmp_path / "peft", use_dora=True)
    with pytest.raises(ArtifactError, match="DoRA adapter"):
        AdapterArtifact.load(tmp_path / "peft")


def test_pissa_saved_by_peft_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    from_peft(tiny_model, tmp_path / "peft", init_lora_weights="pissa")
    with pytest.raises(ArtifactError, match="'pissa', which changes the base"):
        AdapterArtifact.load(tmp_path / "peft")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_lora_with_bias_saved_by_peft_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    from_peft(tiny_model, tmp_path / "peft", lora_bias=True)
    with pytest.raises(ArtifactError, match="sets lora_bias, so it is no plain LoRA"):
        AdapterArtifact.load(tmp_path / "peft")


def classifier() -> Any:
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).requires_grad_(False).eval()


def test_a_classification_head_is_carried_both_ways(tmp_path: Path) -> None:
    model, plain, fresh = classifier(), classifier(), classifier()
    inject(model, MethodConfig(name="lora", rank=2), seed=0)
    move(model)
    meta = ArtifactMeta(method="lora", task="sequence_classification")
    folder = export(model, meta).save(tmp_path / "ours")
    theirs = loaded_by_peft(plain, folder)
    same(logits(theirs), logits(model))
    theirs.save_pretrained(str(tmp_path / "peft"))
    loaded = AdapterArtifact.load(tmp_path / "peft")
    assert set(loaded.heads) == {"score.weight"}
    assert loaded.meta.task == "sequence_classification"
    attach(fresh, loaded)
    same(logits(fresh), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_layer_as_peft_computes_it(dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(7, 5, dtype=dtype)
    model = get_peft_model(
        torch.nn.Sequential(copy.deepcopy(linear)),
        LoraConfig(r=3, lora_alpha=4, target_modules=["0"]),
        autocast_adapter_dtype=False,
    )
    move(model)
    theirs = model.base_model.model[0]
    a, b = (part["default"].weight.detach().to(dtype) for part in (theirs.lora_A, theirs.lora_B))
    ours = AdapterLinear(linear.requires_grad_(False), LoraAdapter(a, b, 4 / 3))
    x = torch.randn(6, 7, dtype=dtype)
    assert_close(ours(x), model(x), dtype, 7, depth=8)

"""Targets, and adapters going in and out of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import MethodError, TargetError
from rayft.methods import METHODS
from rayft.methods.base import AdapterLinear, LayerShape, MethodConfig
from rayft.models import inject as inject_module
from rayft.models.heads import reset_heads
from rayft.models.inject import advance, attach, clear, export, factors_of, inject, wrap
from rayft.models.load import LoadedModel, ModelConfig, load_model
from rayft.models.targets import heads, linear_shapes, select
from rayft.numerics import assert_close


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(ModelConfig(name=str(tiny_folder)), torch.float32)


def logits(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.arange(2, 34).unsqueeze(0)
    with torch.no_grad():
        return loaded.model(input_ids=ids).logits


def perturb(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape))


def test_wrapping_changes_neither_output_nor_state_dict(loaded: LoadedModel) -> None:
    before, keys = logits(loaded), set(loaded.model.state_dict())
    wrap(loaded.model)
    wrap(loaded.model)
    assert torch.equal(logits(loaded), before)
    assert set(loaded.model.state_dict()) == keys
    assert not isinstance(loaded.model.get_output_embeddings(), AdapterLinear)


@pytest.mark.parametrize("name", ["lora", "cla"])
def test_the_formula_counts_what_trains_and_fresh_adapters_change_nothing(
    loaded: LoadedModel, name: str
) -> None:
    before = logits(loaded)
    injected = inject(loaded.model, MethodConfig(name=name, rank=3), seed=1)
    shapes = linear_shapes(loaded.model)
    assert injected.trainable == sum(METHODS[name].trained(LayerShape(*s), 3) for s in shapes.values())
    assert len(injected.modules) == len(shapes) == 14
    assert torch.equal(logits(loaded), before)


@pytest.mark.parametrize("name", sorted({*METHODS} - {"full"}))
def test_a_model_may_change_the_output_of_a_layer_in_place(loaded: LoadedModel, name: str) -> None:
    inject(loaded.model, MethodConfig(name=name, rank=2), seed=0)
    layer = loaded.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, AdapterLinear)
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    found = layer(x)
    expected = found.detach() + 1
    found += torch.ones_like(found)
    assert torch.equal(found, expected)
    found.sum().backward()


def test_full_trains_every_parameter(loaded: LoadedModel) -> None:
    injected = inject(loaded.model, MethodConfig(name="full"), seed=1)
    assert injected.trainable == sum(p.numel() for p in loaded.model.parameters())
    with pytest.raises(MethodError, match="save the model folder"):
        export(loaded.model, ArtifactMeta(method="full"))


def test_a_module_draws_the_same_whatever_else_is_adapted(loaded: LoadedModel) -> None:
    inject(loaded.model, MethodConfig(rank=2), seed=5)
    everything = export(loaded.model, ArtifactMeta())
    inject(loaded.model, MethodConfig(rank=2, targets=("v_proj",)), seed=5)
    some = export(loaded.model, ArtifactMeta())
    assert set(some.modules) < set(everything.modules)
    for name, factors in some.modules.items():
        assert torch.equal(factors.a, everything.modules[name].a)
    inject(loaded.model, MethodConfig(rank=2, targets=("v_proj",)), seed=6)
    name = next(iter(some.modules))
    assert not torch.equal(export(loaded.model, ArtifactMeta()).modules[name].a, some.modules[name].a)


@pytest.mark.parametrize("name", ["lora", "cla"])
def test_exported_and_attached_gives_the_same_logits(loaded: LoadedModel, name: str, tmp_path: Path) -> None:
    base = logits(loaded)
    inject(loaded.model, MethodConfig(name=name, rank=4), seed=0)
    perturb(loaded.model)
    trained = logits(loaded)
    export(loaded.model, ArtifactMeta(method=name)).save(tmp_path / "adapter")
    assert torch.equal(logits(loaded), trained)
    clear(loaded.model)
    assert torch.equal(logits(loaded), base)
    attach(loaded.model, AdapterArtifact.load(tmp_path / "adapter"))
    assert_close(logits(loaded), trained, torch.float32, 64, depth=8)
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("name", ["lora", "cla", "cola", "rc3la", "paca"])
@pytest.mark.parametrize("at_once", [1, 3000, 2**26])
def test_an_export_copies_the_factors_however_many_at_once(
    loaded: LoadedModel, name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(loaded.model, MethodConfig(name=name, rank=2), seed=0)
    perturb(loaded.model)
    if name in ("cola", "rc3la"):
        advance(loaded.model, seed=0, link=1)
        perturb(loaded.model)
    expected = {path: (f.a.clone(), f.b.clone(), f) for path, f in factors_of(loaded.model).items()}
    monkeypatch.setattr(inject_module, "AT_ONCE", at_once)
    found = export(loaded.model, ArtifactMeta(method=name))
    assert isinstance(found, AdapterArtifact)
    # Later training must not change it, nor a change of one factor another.
    perturb(loaded.model)
    for path, (a, b, factors) in expected.items():
        own = found.modules[path]
        assert torch.equal(own.a, a)
        assert torch.equal(own.b, b)
        assert (own.scale, own.columns) == (factors.scale, factors.columns)
        own.a.zero_()
        assert torch.equal(own.b, b)


def test_an_export_copies_all_factors_from_the_device_at_once(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(loaded.model, MethodConfig(rank=2), seed=0)
    joined, cat = list[int](), torch.cat

    def counted(tensors: list[torch.Tensor]) -> torch.Tensor:
        joined.append(len(tensors))
        return cat(tensors)

    monkeypatch.setattr(torch, "cat", counted)
    export(loaded.model, ArtifactMeta())
    assert joined == [28]


def test_classification_heads_train_and_are_saved_with_the_adapter(tiny_folder: Path) -> None:
    config = ModelConfig(name=str(tiny_folder), task="sequence_classification", num_labels=3)
    loaded = load_model(config, torch.float32)
    reset_heads(loaded.model, seed=3)
    injected = inject(loaded.model, MethodConfig(rank=2), seed=3)
    head = heads(loaded.model)["score"].weight
    assert isinstance(head, torch.nn.Parameter)
    assert head.requires_grad
    assert injected.trainable > head.numel()
    artifact = export(loaded.model, ArtifactMeta(task="sequence_classification"))
    assert list(artifact.heads) == ["score.weight"]
    kept = head.detach().clone()
    reset_heads(loaded.model, seed=4)
    assert not torch.equal(head, kept)
    attach(loaded.model, artifact)
    assert torch.equal(head, kept)


SHAPES = {"model.layers.0.self_attn.q_proj": (4, 4), "model.layers.1.mlp.up_proj": (8, 4)}


def test_targets_select_all_layers_last_parts_of_names_or_a_regular_expression() -> None:
    assert select(SHAPES, "all-linear") == list(SHAPES)
    assert select(SHAPES, ("up_proj",)) == ["model.layers.1.mlp.up_proj"]
    assert select(SHAPES, r".*layers\.0\..*") == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (("up_porj",), "did you mean 'up_proj'"),
        ("q_proj", "matches no linear layer; paths look like model"),
        ("(", "no regular expression"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets: str | tuple[str, ...], match: str) -> None:
    with pytest.raises(TargetError, match=match):
        select(SHAPES, targets)


def test_a_rank_above_a_layers_limit_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(TargetError, match=r"k_proj \(16x32\) can hold with 'lora': use a rank of at most 16"):
        inject(loaded.model, MethodConfig(rank=17), seed=0)

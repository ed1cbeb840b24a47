"""The registered tiny models: what each is there for, and that all of them run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from rayft.errors import ModelError
from rayft.methods.base import MethodConfig
from rayft.models.inject import inject
from rayft.models.load import (
    REGISTERED,
    LoadedModel,
    ModelConfig,
    context_length,
    load_encoder,
    load_model,
    load_skeleton,
)
from rayft.models.targets import linear_shapes
from rayft.models.tiny import TINY

TASKS = {"tiny-bert": "sequence_classification", "tiny-vit": "image_classification"}


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def config(name: str, **values: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": name, "task": TASKS.get(name, "causal_lm"), **values})


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        if loaded.model.main_input_name == "pixel_values":
            pixels = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)
            return loaded.model(pixel_values=pixels.to(loaded.model.dtype)).logits
        ids = torch.arange(8, 40).reshape(2, 16)
        return loaded.model(input_ids=ids).logits


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_tiny_model_loads_alike_each_time_and_takes_adapters(name: str, tmp_path: Path) -> None:
    assert name in REGISTERED
    loaded = load_model(config(name), torch.float32)
    found = logits(loaded)
    assert torch.isfinite(found).all()
    # As large as a trained model's: an adapter's effect must not drown in rounding.
    assert found.std() > 0.05
    assert torch.equal(found, logits(load_model(config(name), torch.float32)))
    again = load_model(ModelConfig(name=str(TINY[name](tmp_path)), task=config(name).task), torch.bfloat16)
    assert again.fingerprint == loaded.fingerprint
    state = torch.get_rng_state()
    TINY[name](tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert inject(loaded.model, MethodConfig(rank=2), seed=0).trainable > 0
    assert torch.equal(logits(loaded), found)


@pytest.mark.parametrize("name", sorted(TINY))
def test_dropout_is_off_in_every_layer(name: str) -> None:
    loaded = load_model(config(name), torch.float32)
    rates = {module.p for module in loaded.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates <= {0.0}
    before = logits(loaded)
    loaded.model.train()
    assert torch.equal(logits(loaded), before)


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_skeleton_says_what_the_model_is(name: str) -> None:
    loaded, skeleton = load_model(config(name), torch.float32), load_skeleton(config(name))
    assert linear_shapes(skeleton) == linear_shapes(loaded.model)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    encoder = load_encoder(config(name), skeleton.config)
    assert type(encoder) is type(loaded.tokenizer)
    assert context_length(config(name), skeleton.config, encoder) == loaded.context


def test_shapes_are_odd_where_mistakes_would_hide() -> None:
    shapes = {name: linear_shapes(load_skeleton(config(name))) for name in TINY}
    assert shapes["tiny-qwen"]["model.layers.0.self_attn.q_proj"] == (48, 40)
    assert shapes["tiny-qwen"]["model.layers.0.self_attn.o_proj"] == (40, 48)
    assert shapes["tiny-gpt2"]["transformer.h.0.attn.c_attn"] == (120, 40)
    assert (56, 24) in shapes["tiny-bert"].values()
    assert (56, 40) in shapes["tiny-vit"].values()
    gpt2 = load_skeleton(config("tiny-gpt2"))
    assert isinstance(gpt2.transformer.h[0].mlp.c_fc, Conv1D)
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    qwen = load_skeleton(config("tiny-qwen"))
    assert qwen.lm_head.weight is not qwen.model.embed_tokens.weight


def test_bert_reads_special_tokens_around_a_text() -> None:
    loaded = load_model(config("tiny-bert"), torch.float32)
    tokens = loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer("ab")["input_ids"])
    assert tokens == ["[CLS]", "a", "b", "[SEP]"]
    assert loaded.tokenizer.decode(loaded.tokenizer("a b")["input_ids"], skip_special_tokens=True) == "a b"
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id == 0
    assert loaded.context == 128


def test_a_head_of_other_classes_is_made_anew_alike_each_time() -> None:
    loaded = [load_model(config("tiny-bert", num_labels=5), torch.float32) for _ in range(2)]
    heads = [item.model.classifier.weight for item in loaded]
    assert heads[0].shape == (5, 24)
    assert torch.equal(*heads)
    assert loaded[0].fingerprint == load_model(config("tiny-bert"), torch.float32).fingerprint


def test_base_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = TINY["tiny-bert"](tmp_path / "bert")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"another size than config\.json says"):
        load_model(ModelConfig(name=str(folder), task="sequence_classification"), torch.float32)


@pytest.mark.parametrize(
    ("name", "task"), [("tiny-llama", "image_classification"), ("tiny-vit", "causal_lm")]
)
def test_a_model_that_does_something_else(name: str, task: str) -> None:
    with pytest.raises(ModelError, match=f"can't load {name} for {task}"):
        load_model(ModelConfig.model_validate({"name": name, "task": task}), torch.float32)


def test_an_image_model_without_its_processor(tmp_path: Path) -> None:
    folder = TINY["tiny-vit"](tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"can't load .* for image_classification"):
        load_model(ModelConfig(name=str(folder), task="image_classification"), torch.float32)

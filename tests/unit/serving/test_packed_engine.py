"""Attention of the engine for CPUs: what it knows, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from rayft.errors import ModelError
from rayft.models.load import LoadedModel, ModelConfig, load_model
from rayft.serving.engine import EngineLimits, GenerationRequest
from rayft.serving.packed_engine import PackedEngine
from rayft.serving.packed_row import _attention
from tests.unit.serving.test_engines import ask_all, tokens_of

LIMITS = EngineLimits(8, 16, 2048)
WINDOW = 7


@pytest.fixture(scope="module")
def sliding(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens see the last few alone, with heads that share keys."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=WINDOW, max_position_embeddings=256,
        eos_token_id=tiny_tokenizer.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sliding")
    MistralForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_a_sliding_window_is_kept_whether_prompts_are_read_whole_or_in_parts(
    sliding: Path, tiny_tokenizer: Any
) -> None:
    prompts = [tokens_of(tiny_tokenizer, text) for text in ("hello", "a long prompt, " * 4, "twelve signs")]
    plain: Any = MistralForCausalLM.from_pretrained(sliding)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
        )
        expected.append(tuple(made[0, len(prompt) :].tolist()))
    assert max(map(len, prompts)) > 2 * LIMITS.max_batch_tokens > 2 * WINDOW
    loaded = load_model(ModelConfig(name=str(sliding)), torch.float32)
    engine = PackedEngine(loaded, LIMITS)
    try:
        found = ask_all(engine, [GenerationRequest(prompt, 20) for prompt in prompts])
    finally:
        engine.stop()
    ended = [tokens[:-1] if tokens[-1] == tiny_tokenizer.eos_token_id else tokens for tokens in expected]
    assert [step.tokens for step in found] == ended
    assert len(set(ended)) == len(prompts)


def test_attention_of_another_kind_is_refused() -> None:
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelError, match="softcap is not known to this engine; set engine: transformers"):
        _attention(None, states, states, states, None, softcap=30.0)


def test_a_model_with_layers_of_another_kind_is_refused(loaded: LoadedModel) -> None:
    loaded.model.config.num_hidden_layers += 1
    with pytest.raises(ModelError, match=r"2 of the model's 3 layers .* set engine: transformers"):
        PackedEngine(loaded, LIMITS)

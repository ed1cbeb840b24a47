"""Packed batches against the model's own forward, and which models are refused."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import Any

import pytest
import torch
import transformers

from rayft.errors import ModelError
from rayft.models.attention import longest_sequence
from rayft.numerics import assert_close, relative_error
from rayft.serving.engine.api import GenerationRequest
from rayft.serving.engine.cpu.runner import Runner, _attention
from rayft.serving.engine.cpu.scheduler import Chunk, Sequence
from rayft.serving.engine.cpu.slots import Slots

WINDOW = 7
SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "qk_nope_head_dim": 8, "n_group": 1, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 1,
}  # fmt: skip


def model_of(kind: str, **options: Any) -> Any:
    """Return a random model whose tokens depend strongly on those before them."""
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def runner_of(model: Any) -> Runner:
    return Runner(model, Slots(model, torch.float32))


def run(runner: Runner, sequences: list[Sequence], sizes: Tokens[int]) -> dict[Sequence, torch.Tensor]:
    """Process so many tokens of each sequence; return the logits of those whose tokens are all processed."""
    chunks, start = [], 0
    for sequence, size in zip(sequences, sizes, strict=True):
        chunks.append(Chunk(sequence, start, size, complete=size == sequence.uncached))
        start += size
    complete = [chunk.sequence for chunk in chunks if chunk.complete]
    return dict(zip(complete, runner.run(chunks), strict=True))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
        ("mistral", {"sliding_window": WINDOW}),
        ("gemma2", {"head_dim": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 0.5}),
        ("qwen3_moe", EXPERTS),
        ("deepseek_v3", {**EXPERTS, **LATENT}),
        # Does not pass a forward's further arguments on to attention functions.
        ("stablelm", {}),
    ],
)
def test_packed_chunks_give_what_each_sequence_gives_alone(kind: str, options: dict[str, Any]) -> None:
    model = model_of(kind, **options)
    prompts = [torch.randint(SHAPE["vocab_size"] or 0, (length,)).tolist() for length in (21, 6, 13)]
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    runner = runner_of(model)
    sequences = [Sequence(GenerationRequest(tuple(prompt), 1)) for prompt in prompts]
    # The first chunk of a prompt, the next one, all of it, and a single token.
    found = (
        run(runner, sequences, (10, 6, 12))
        | run(runner, sequences[::2], (9, 1))
        | run(runner, sequences[:1], (2,))
    )
    for sequence, logits in zip(sequences, expected, strict=True):
        assert_close(found[sequence], logits, torch.float32, 64, depth=8)


def test_soft_caps_and_windows_make_a_difference() -> None:
    prompt = torch.tensor([[*range(20)]])
    plain, window, capped = (
        model_of("gemma2", head_dim=8, sliding_window=window, attn_logit_softcapping=cap)
        for window, cap in ((64, None), (WINDOW, None), (64, 0.5))
    )
    for other in (window, capped):
        other.load_state_dict(plain.state_dict())
        assert relative_error(other(prompt).logits[0, -1], plain(prompt).logits[0, -1]) > 0.01


@pytest.mark.parametrize("length", [16, 17])
def test_a_sequence_changes_no_other_up_to_the_length_where_rotations_change(length: int) -> None:
    rotation = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    }  # fmt: skip
    model = model_of("phi3", rope_parameters=rotation, original_max_position_embeddings=16, eos_token_id=2)
    assert longest_sequence(model.config) == 16
    prompt = tuple(range(6))
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    sequences = [Sequence(GenerationRequest(tuple(range(length)), 1)), Sequence(GenerationRequest(prompt, 1))]
    found = run(runner_of(model), sequences, (length, len(prompt)))[sequences[1]]
    assert (relative_error(found, expected) < 1e-4) == (length == 16)


LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "feature"),
    [
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 8}, "GptOssAttention has attention sinks"),
        ("qwen3_next", {**EXPERTS, **LINEAR}, "layers of type linear_attention"),
        ("mamba", {}, "layers of type linear_attention"),
        ("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4}, "layers of type hybrid"),
        (
            "llama4_text",
            {**EXPERTS, "num_local_experts": 4, "head_dim": 8},
            "layers of type chunked_attention",
        ),
        ("diffllama", {}, "DiffLlamaAttention has attention several times in a layer"),
        ("qwen2_moe", {**EXPERTS, "use_sliding_window": True, "max_window_layers": 2}, "does not pass"),
        # Its own attention; and positions that are counted from the start of the batch.
        ("bloom", {"n_head": 4, "n_layer": 2}, "has other logits if sequences are packed"),
        ("marian", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, "has other logits"),
        ("cpmant", {"dim_head": 8, "dim_ff": 48}, "linear layer computes 40 rows for 8 tokens"),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused(
    kind: str, options: dict[str, Any], feature: str
) -> None:
    model = model_of(kind, **options)
    with pytest.raises(ModelError, match=rf"{feature}.* serve the model with vLLM on a GPU \(engine: vllm\)"):
        runner_of(model)


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"position_bias": torch.zeros(1)}, "a position bias"),
        ({"attention_mask": torch.zeros(1)}, "attention_mask"),
        ({"is_causal": False}, "attention to later tokens"),
    ],
)
def test_options_that_change_attention_are_refused(options: dict[str, Any], feature: str) -> None:
    layer = model_of("llama").model.layers[0].self_attn
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelError, match=f"LlamaAttention has {feature}, which .* does not support"):
        _attention(layer, states, states, states, **{"attention_mask": None, **options})

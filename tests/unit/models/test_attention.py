"""Attention by segments against a mask of all pairs and against each segment alone, with gradients."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
)

from rayft.errors import ModelError
from rayft.models import attention as module
from rayft.models.attention import (
    NAME,
    attend_by_segments,
    check_packing,
    dense_mask,
    longest_sequence,
    mask_for,
    segment_attention,
)
from rayft.numerics import assert_close

LENGTHS = (5, 1, 9, 3, 6)
ROWS, WIDTH = 2, 12
OFFSETS = torch.tensor([0, 5, 6, 12, 12, 15, 21, 24, 24, 24], dtype=torch.int32)
"""Two rows of 12 tokens: segments of 5, 1, 6, an empty one, then 3, 6, 3, and two empty ones at the end."""
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 8,
}
"""Rotations that change beyond position 8."""


class Layer(torch.nn.Module):
    """What attention functions read of a layer."""

    num_key_value_groups, layer_idx, is_causal = 2, 0, True


def inputs(value_size: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sizes = ((ROWS, 4, WIDTH, 8), (ROWS, 2, WIDTH, 8), (ROWS, 2, WIDTH, value_size))
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, softcap: float | None, sinks: Any
) -> torch.Tensor:
    k, v = (one.repeat_interleave(2, 1) for one in (k, v))
    scores = q @ k.transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.exp()
    rest = 0 if sinks is None else sinks.exp().view(1, -1, 1, 1)
    return ((weights / (weights.sum(-1, keepdim=True) + rest)) @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("value_size", [8, 5])
def test_segments_are_what_a_mask_of_all_pairs_computes(
    window: int | None, softcap: float | None, sinks: bool, value_size: int
) -> None:
    aux = torch.linspace(-1, 1, 4, dtype=torch.float64) if sinks else None
    given = inputs(value_size)
    found, _ = segment_attention(
        Layer(), *given, OFFSETS.view(1, 1, 1, -1), 0.3, sliding_window=window, softcap=softcap, s_aux=aux
    )
    mask = dense_mask(OFFSETS, ROWS, WIDTH, window)
    expected = plain(*given, mask, softcap, aux)
    assert found.shape == expected.shape
    assert_close(found, expected, torch.float64, 8, depth=4)
    direction = torch.randn_like(expected)
    mine = torch.autograd.grad((found * direction).sum(), given)
    others = torch.autograd.grad((expected * direction).sum(), given)
    for one, other in zip(mine, others, strict=True):
        # With one key, scores have no gradient.
        assert_close(one + direction.norm(), other + direction.norm(), torch.float64, 64, depth=4)
    # A segment that saw the one before it would be noticed.
    leaky = plain(*given, dense_mask(torch.tensor([0, 12, 24]), ROWS, WIDTH, window), softcap, aux)
    assert window == 1 or (leaky - expected).abs().max() > 0.01


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (0.7, False), (0.7, True)])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_without_segments_it_is_attention_by_a_mask(softcap: float | None, sinks: bool, mask: str) -> None:
    aux = torch.linspace(-1, 1, 4, dtype=torch.float64) if sinks else None
    given = inputs()
    allowed = dense_mask(torch.tensor([0, 12, 24]), ROWS, WIDTH)
    lowest = torch.finfo(torch.float64).min
    masks = {"none": None, "bool": allowed, "float": torch.zeros(1).double().where(allowed, lowest)}
    found, _ = segment_attention(Layer(), *given, masks[mask], 0.3, softcap=softcap, s_aux=aux)
    assert_close(found, plain(*given, allowed, softcap, aux), torch.float64, 8, depth=4)


@pytest.mark.parametrize("options", [{"position_bias": torch.zeros(1)}, {"is_causal": False}])
def test_an_option_that_is_not_known_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=rf"Layer has attention with {next(iter(options))}"):
        segment_attention(Layer(), *inputs(), OFFSETS.view(1, 1, 1, -1), **options)


def test_it_can_be_differentiated_twice() -> None:
    q, k, v = (one.detach()[:1, :2, :6].requires_grad_() for one in inputs())
    offsets = torch.tensor([0, 4, 6], dtype=torch.int32).view(1, 1, 1, -1)

    def attend(*given: torch.Tensor) -> torch.Tensor:
        return segment_attention(Layer(), *given, offsets)[0]

    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(attend, (q, k, v))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("knows_groups", [False, True])
def test_flash_attention_is_called_as_this_release_of_pytorch_defines_it(
    monkeypatch: pytest.MonkeyPatch, window: int | None, *, knows_groups: bool
) -> None:
    real = inspect.signature(varlen.varlen_attn)
    if knows_groups and "enable_gqa" not in real.parameters:
        pytest.skip("this release of PyTorch repeats the heads of keys and values for no one")
    left = [one for one in real.parameters.values() if knows_groups or one.name != "enable_gqa"]
    calls: list[dict[str, Any]] = []

    def attend(*given: Any, **options: Any) -> torch.Tensor:
        bound = real.replace(parameters=left).bind(*given, **options)
        calls.append(bound.arguments)
        return given[0]

    attend.__signature__ = real.replace(parameters=left)  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", attend)
    monkeypatch.setattr(module, "_flash", lambda *_: True)
    q, k, v = inputs()
    found, _ = segment_attention(Layer(), q, k, v, OFFSETS.view(1, 1, 1, -1), 0.3, sliding_window=window)
    assert torch.equal(found, q.transpose(1, 2))
    (call,) = calls
    heads = 2 if knows_groups else 4
    assert [call[name].shape[1] for name in ("query", "key", "value")] == [4, heads, heads]
    assert call.get("enable_gqa", False) == knows_groups
    assert torch.equal(call["cu_seq_q"], OFFSETS)
    assert torch.equal(call["cu_seq_k"], OFFSETS)
    assert (call["max_q"], call["max_k"], call["scale"]) == (WIDTH, WIDTH, 0.3)
    assert call["window_size"] == ((-1, 0) if window is None else (2, 0))


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt_oss": {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "olmo3": {"sliding_window": 4},
    "qwen2": {},
    "smollm3": {},
    "exaone4": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
"""Types of models, with what their configuration needs beside `SMALL`."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_examples_have_the_logits_and_gradients_that_each_has_alone(
    kind: str, checkpointing: bool
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SMALL | KINDS[kind])).float()
    attend_by_segments(model)
    assert model.config._attn_implementation == NAME
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ends = torch.tensor(LENGTHS).cumsum(0)
    assert_each_is_alone(model, torch.cat([torch.zeros(1), ends]).int())


@pytest.mark.parametrize("gone", [1, 3])
def test_a_segment_that_sees_the_next_is_noticed(gone: int) -> None:
    """The segments before and after a boundary are one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SMALL)).float().train()
    attend_by_segments(model)
    offsets = torch.cat([torch.zeros(1), torch.tensor(LENGTHS).cumsum(0)]).int()
    with pytest.raises(AssertionError, match="relative error"):
        assert_each_is_alone(model, torch.cat([offsets[:gone], offsets[gone + 1 :]]))


def assert_each_is_alone(model: Any, offsets: torch.Tensor) -> None:
    """Compare a packed row with each of its examples, in logits and gradients."""
    ids = torch.randint(1, 64, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mask = mask_for(model, offsets, *ids.shape)
    assert mask.numel() == len(offsets)

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        return list(
            torch.autograd.grad(logits.sin().sum(), weights, allow_unused=True, materialize_grads=True)
        )

    packed = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]
    found = gradients(packed)
    expected = [torch.zeros_like(one) for one in weights]
    model.set_attn_implementation("eager")
    for piece, logits in zip(ids[0].split(LENGTHS), packed.split(LENGTHS), strict=True):
        alone = model(input_ids=piece[None], use_cache=False).logits[0]
        assert_close(logits, alone, torch.float32, 64, depth=32)
        expected = [before + one for before, one in zip(expected, gradients(alone), strict=True)]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, torch.float32, 64 * sum(LENGTHS), depth=32)


def small(kind: str, **more: Any) -> Any:
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SMALL | more))


def test_a_model_with_attention_of_its_own_gets_a_mask() -> None:
    config = CONFIG_MAPPING["falcon"](
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    attend_by_segments(model)
    assert model.config._attn_implementation == "sdpa"
    assert mask_for(model, OFFSETS, ROWS, WIDTH).shape == (ROWS, 1, WIDTH, WIDTH)


def test_a_model_that_takes_no_mask_of_all_pairs_is_refused() -> None:
    config = CONFIG_MAPPING["xglm"](vocab_size=64, d_model=16, num_layers=1, attention_heads=2, ffn_dim=16)
    with pytest.raises(ModelError, match="XGLMForCausalLM has attention that rayft does not know"):
        attend_by_segments(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("kind", "more", "length", "what"),
    [
        ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8}, 9, "linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, 9, "conv"),
        ("phimoe", {"sliding_window": 8, "num_local_experts": 2}, 9, "8 tokens at most, .* data.max_length"),
        (
            "phi3",
            {"rope_parameters": {**LONG}, "original_max_position_embeddings": 8},
            9,
            "data.max_length to 8",
        ),
    ],
)
def test_models_whose_examples_would_see_one_another_are_refused(
    kind: str, more: dict[str, Any], length: int, what: str
) -> None:
    with pytest.raises(ModelError, match=rf"{what}.*data.packing: false"):
        check_packing(small(kind, **more), length)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("llama", {}), ("gemma2", {}), ("phimoe", {"sliding_window": 9, "num_local_experts": 2})],
)
def test_models_whose_examples_see_only_themselves_are_not_refused(kind: str, more: dict[str, Any]) -> None:
    check_packing(small(kind, **more), 9)


def test_most_rotations_never_change() -> None:
    plain = LlamaConfig()
    assert longest_sequence(plain) is None
    assert longest_sequence(GPT2Config()) is None
    # Parameters for each type of layers.
    assert longest_sequence(Gemma3TextConfig()) is None
    plain.rope_parameters = {"full_attention": LONG, "sliding_attention": {"rope_type": "default"}}
    assert longest_sequence(plain) == 8

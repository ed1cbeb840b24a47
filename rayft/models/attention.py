"""Attention within the segments of packed rows, without a mask of T × T.

transformers hands a mask of four dimensions on to the attention function as it is. Instead of a mask, packed
rows have the offsets of their segments there. On GPUs PyTorch's attention for sequences of various lengths
(FlashAttention) takes them; elsewhere each segment has a call of its own. Without offsets, as in generation,
attention is transformers' for SDPA.

Shapes: B rows, T tokens, H heads, G heads of keys and values, D numbers per head, S segments.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from rayft.errors import ModelError

__all__ = [
    "LAYER_TYPES",
    "NAME",
    "attend_by_segments",
    "causal_mask",
    "check_packing",
    "dense_mask",
    "fits_graphs",
    "longest_sequence",
    "mask_for",
    "plain_attention",
    "unknown_options",
    "why_dense",
]

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""The types of layers, in a configuration of transformers, that pass information by attention alone."""
MIXING = {"minimax", "recurrent_gemma", "lfm2", "lfm2_moe", "lfm3"}
"""Types of models with convolutions or recurrence that nothing else in transformers tells."""
MASKED_WINDOWS = {
    "llama4_text": "attention_chunk_size", "phimoe": "sliding_window", "qwen2_moe": "sliding_window",
}  # fmt: skip
"""Types of models whose windows are in the mask alone → the setting with their size."""

NAME = "rayft_segments"
"""The name of this attention among transformers' implementations."""

HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
"""The most numbers per head that FlashAttention takes."""
IGNORED = {
    "cache_position", "is_causal", "output_attentions", "output_router_logits", "position_ids", "use_cache",
}  # fmt: skip
"""Options of attention functions that change nothing here."""


def attend_by_segments(model: Any) -> None:
    """Let a causal language model attend by segments, if it calls transformers' attention functions.

    Other models keep SDPA, which is given a mask (`why_dense`).

    Raises:
        ModelError: if the model has neither.
    """
    # Imported here, because it imports what all of transformers' models need, which takes two seconds.
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if model._supports_attention_backend:
        AttentionInterface.register(NAME, segment_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
        return
    if model.config._attn_implementation != "sdpa":
        raise ModelError(
            f"{type(model).__name__} has attention that rayft does not know; choose another base"
        )


def check_packing(model: Any, length: int) -> None:
    """Refuse a causal language model in which examples that share a row would see one another.

    Args:
        model: the model.
        length: the longest segment.

    Raises:
        ModelError: if not only attention passes information between tokens, windows of attention are given
            to it in masks alone, or a long example changes the rotary frequencies of the others.
    """
    config = model.config.get_text_config()
    longest = longest_sequence(config)
    if longest is not None and length > longest:
        raise ModelError(
            f"{type(model).__name__} uses other rotary frequencies for a whole batch if an example in it is "
            f"longer than {longest:,} tokens (LongRoPE), so short examples would depend on those that share "
            f"their rows; set data.max_length to {longest} or less, or data.packing: false"
        )
    kinds = {*(getattr(config, "layer_types", None) or ())} - LAYER_TYPES
    mixes = sorted(kinds) or (["a state"] if getattr(model, "_is_stateful", False) else [])
    if mixes or config.model_type in MIXING:
        what = f"has layers of another kind than attention ({mixes[0] if mixes else config.model_type})"
    else:
        size = getattr(config, MASKED_WINDOWS.get(config.model_type, ""), None)
        if size is None or size >= length or not getattr(config, "use_sliding_window", True):
            return
        what = f"attends to {size} tokens at most, which is less than data.max_length ({length})"
    raise ModelError(
        f"{type(model).__name__} {what}, so examples that share a row would be computed wrongly; set "
        "data.packing: false, or choose another base"
    )


def longest_sequence(config: Any) -> int | None:
    """Return the longest sequence that changes no other one of its batch, in tokens; None without a limit.

    If a sequence is longer than the original context, LongRoPE uses other rotary frequencies for the whole
    forward pass: for shorter sequences of the batch too, and beside cached keys that have the former ones.

    Args:
        config: of the model, as transformers reads it.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # Some models have parameters for each type of layers.
    each = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    return min(
        (int(one["original_max_position_embeddings"]) for one in each if one.get("rope_type") == "longrope"),
        default=None,
    )


def mask_for(model: Any, offsets: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """Return what a model takes as `attention_mask` for packed rows.

    Args:
        model: a causal language model.
        offsets: (S + 1,) int32: where the segments begin in the B·T tokens, and B·T.
        rows: B.
        width: T.

    Returns:
        The offsets, (1, 1, 1, S + 1), or else the mask (B, 1, T, T).
    """
    if model.config._attn_implementation == NAME:
        return offsets.view(1, 1, 1, -1)
    return dense_mask(offsets, rows, width)


def fits_graphs(model: Any, device: torch.device) -> bool:
    """Return whether a model's attention takes offsets in CUDA graphs, where their values can't be read."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = not any(
        getattr(config, name, None)
        for name in ("attn_logit_softcapping", "kv_lora_rank", "attention_dropout")
    )
    return plain and config.model_type != "gpt_oss" and _fits_flash(model.dtype, size, device)


def why_dense(model: Any, device: torch.device, *, graphs: bool) -> str:
    """Return why a model's rows take a mask of all pairs of tokens, and what that costs; empty if they don't.

    Args:
        model: a causal language model.
        device: where it is trained.
        graphs: whether its passes are captured as CUDA graphs.
    """
    name, costs = type(model).__name__, "time and memory of attention grow with the square of data.max_length"
    if model.config._attn_implementation != NAME:
        return f"{name} has attention of its own, so its rows take a mask of all pairs of tokens: {costs}"
    if graphs and not fits_graphs(model, device):
        kind = str(model.dtype).removeprefix("torch.")
        return (
            f"attention by segments of {name} in {kind} can't be captured as a CUDA graph on this device, so "
            f"its rows take a mask of all pairs of tokens: {costs}; scale.graphs: false avoids that"
        )
    return ""


def dense_mask(offsets: torch.Tensor, rows: int, width: int, window: int | None = None) -> torch.Tensor:
    """Return the mask of packed rows: (B, 1, T, T) bool, true where a token (third axis) attends to another.

    Args:
        offsets: (S + 1,), as in `mask_for`.
        rows: B.
        width: T.
        window: number of last tokens that a token attends to, itself included; None for all.
    """
    place = torch.arange(rows * width, device=offsets.device)
    segment = torch.searchsorted(offsets, place, right=True).view(rows, width)
    near = causal_mask(width, width, window, offsets.device)
    return ((segment[:, :, None] == segment[:, None, :]) & near).unsqueeze(1)


def segment_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each segment, or by a mask; the interface is that of transformers' attention functions.

    Args:
        module: the attention layer.
        query: (B, H, T, D).
        key: (B, G, T, D).
        value: (B, G, T, D or another size).
        attention_mask: offsets (1, 1, 1, S + 1) int32, or a mask (B, 1, T, keys), or None.
        scaling: factor of the scores; 1/√D by default.
        dropout: probability with which a weight becomes 0.
        sliding_window: number of last tokens that a token attends to, itself included; None for all.
        softcap: bound of the scores; None for none.
        s_aux: (H,): scores of attention sinks; None for none.
        options: further options.

    Returns:
        The output (B, T, H, size of a value), and no weights.

    Raises:
        ModelError: for an option that would change the result and is not known here.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = softcap is None and s_aux is None
    if attention_mask is None or attention_mask.dtype != torch.int32:
        if plain:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
            )
        given = (
            causal_mask(query.shape[2], key.shape[2], device=query.device)
            if attention_mask is None
            else attention_mask
        )
        return plain_attention(query, key, value, given, scale, softcap, s_aux, dropout).transpose(1, 2), None
    _check(module, options)
    offsets = attention_mask.view(-1)
    if plain and not dropout and _flash(query, value):
        return _varlen(query, key, value, offsets, scale, sliding_window), None
    bounds = offsets.tolist()
    sizes = [end - begin for begin, end in pairwise(bounds)]
    rows, _, width, _ = query.shape
    # One row of all tokens: (1, H, B·T, D). `split` joins the gradients of all segments at once.
    split = [
        matrix.transpose(0, 1).flatten(1, 2).unsqueeze(0).split(sizes, dim=2)
        for matrix in (query, key, value)
    ]
    found = []
    for q, k, v in zip(*split, strict=True):
        length = q.shape[2]
        if not length:
            continue
        if not plain:
            near = causal_mask(length, length, sliding_window, q.device)
            found.append(plain_attention(q, k, v, near, scale, softcap, s_aux, dropout))
            continue
        # The fused kernels know causal attention, but no window.
        windowed = sliding_window is not None and sliding_window < length
        mask = causal_mask(length, length, sliding_window, q.device) if windowed else None
        grouped = q.shape[1] != k.shape[1]
        found.append(
            functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        )
    together = torch.cat(found, dim=2)[0]
    return together.unflatten(1, (rows, width)).permute(1, 2, 0, 3).contiguous(), None


def _flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether FlashAttention applies; callers that need a second derivative disable it."""
    size = query.shape[-1]
    return (
        size == value.shape[-1]
        and torch.backends.cuda.flash_sdp_enabled()
        and _fits_flash(query.dtype, size, query.device)
    )


def _fits_flash(dtype: torch.dtype, size: int, device: torch.device) -> bool:
    """Return whether FlashAttention computes in a dtype, with heads of a size, on a device."""
    return (
        device.type == "cuda"
        and dtype in HALF
        and size <= LARGEST_HEAD
        and size % 8 == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    # Imported here, because it imports PyTorch's compiler, which takes a second.
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, width, _ = query.shape
    options: dict[str, Any] = {}
    if heads != key.shape[1]:
        # As it does from PyTorch 2.12 on.
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options = {"enable_gqa": True}
        else:
            key, value = (one.repeat_interleave(heads // one.shape[1], 1) for one in (key, value))
    q, k, v = (matrix.transpose(1, 2).flatten(0, 1) for matrix in (query, key, value))
    past = -1 if window is None else window - 1
    # No segment is longer than a row; its true length would have to be waited for.
    found: Any = varlen_attn(
        q, k, v, offsets, offsets, width, width, scale=scale, window_size=(past, 0), **options
    )
    attended: torch.Tensor = found.unflatten(0, (rows, width))
    return attended


def causal_mask(new: int, length: int, window: int | None = None, device: Any = None) -> torch.Tensor:
    """Return which of `length` tokens each of the last `new` ones attends to: (new, length) bool.

    Args:
        new: number of tokens that attend.
        length: number of tokens.
        window: number of last tokens that a token attends to, itself included; None for all.
        device: of the result.
    """
    place = torch.arange(length, device=device)
    distance = place[length - new :, None] - place
    return (distance >= 0) & (distance < (window or length))


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend by plain operations, with bounded scores and attention sinks.

    Args:
        query: (B, H, T, D).
        key: (B, G, keys, D).
        value: (B, G, keys, D or another size).
        mask: where a query attends to a key (bool), or what is added to the scores; None for everywhere.
        scale: factor of the scores.
        softcap: bound of the scores; None for none.
        sinks: (H,): scores of attention sinks; None for none.
        dropout: probability with which a weight becomes 0.

    Returns:
        (B, H, T, size of a value).
    """
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return functional.dropout(weights.to(value.dtype), dropout) @ value


def unknown_options(options: Mapping[str, Any]) -> list[str]:
    """Return the options of an attention function that are not known here and would change its result."""
    unknown = [name for name, given in options.items() if given is not None and name not in IGNORED]
    return [*unknown, *(["is_causal=False"] if options.get("is_causal") is False else [])]


def _check(module: Any, options: Mapping[str, Any]) -> None:
    if unknown := unknown_options(options):
        raise ModelError(
            f"{type(module).__name__} has attention with {unknown[0]}, which packed rows do not support; "
            "choose another base"
        )

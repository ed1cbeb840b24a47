"""Runs the model over a batch in which the tokens of all sequences lie end to end.

Every linear layer processes the batch as one matrix. Attention separates the sequences again, by one fused
call for each sequence and layer, in which its tokens attend to its own KV cache. So nothing is padded, no
mask between sequences is needed, and what overflows in one sequence stays in it.

Models call the attention function by its name in transformers' public `AttentionInterface`; for a name that
transformers does not know itself, they make no mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from rayft.errors import ModelError
from rayft.kernels.segment_lora import BASE_SLOT
from rayft.models.attention import LAYER_TYPES, causal_mask, plain_attention, unknown_options
from rayft.numerics import relative_error
from rayft.serving.engine.api import GenerationRequest
from rayft.serving.engine.cpu.sampling import logprobs
from rayft.serving.engine.cpu.scheduler import Chunk, Sequence
from rayft.serving.engine.cpu.slots import Slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Runner"]

ATTENTION = "rayft_cpu"
"""Name under which transformers knows the attention function."""
SLIDING = "sliding_attention"
FEATURES = {"s_aux": "attention sinks", "sinks": "attention sinks", "position_bias": "a position bias"}
"""Options of attention functions that are not supported, and what they are called."""
TRIED = 8
"""Number of tokens with which a model is checked at the start."""


@dataclass(frozen=True)
class _Batch:
    """What the attention function needs to know of a forward."""

    chunks: list[Chunk]
    windows: dict[int, int | None] = field(default_factory=dict)
    """Layer → size of its sliding window, for each layer that called the attention function."""


_batch: ContextVar[_Batch] = ContextVar("batch")
"""The batch of the forward that runs now in this thread."""


class Runner:
    """A model, and the adapters in it."""

    def __init__(self, model: PreTrainedModel, slots: Slots) -> None:
        """Prepare a model; nothing else may run it from now on.

        Raises:
            ModelError: if the model has layers or attention that this engine does not support.
        """
        self._model: Any = model.eval()
        self._slots = slots
        self._check()

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> torch.Tensor:
        """Process a batch: extend the KV caches, and the log-probabilities of prompts that are scored.

        Returns:
            The logits after the last token of each complete chunk (complete chunks × V).
        """
        logits = self._forward(_Batch(chunks))
        if any(chunk.sequence.scoring for chunk in chunks):
            logits = _score_prompts(chunks, logits)
        for chunk in chunks:
            chunk.sequence.cache.length += chunk.size
        return logits

    def _forward(self, batch: _Batch) -> torch.Tensor:
        """Return the logits after the tokens in `Chunk.logit_indices` of all chunks (tokens × V)."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for chunk in batch.chunks:
            first = chunk.sequence.cache.length
            ids += chunk.sequence.tokens[first : first + chunk.size]
            positions += range(first, first + chunk.size)
            slots += [chunk.sequence.slot] * chunk.size
        self._slots.assign(slots)
        indices = [index for chunk in batch.chunks for index in chunk.logit_indices]
        token = _batch.set(batch)
        try:
            output = self._model(
                input_ids=torch.tensor([ids]),
                position_ids=torch.tensor([positions]),
                use_cache=False,
                logits_to_keep=torch.tensor(indices, dtype=torch.long),
            )
        finally:
            _batch.reset(token)
        return output.logits[0]  # type: ignore[no-any-return]

    def _check(self) -> None:
        """Refuse a model that this engine would compute wrongly: compare a forward with the model's own."""
        name, config = type(self._model).__name__, self._model.config.get_text_config()
        types = getattr(config, "layer_types", None) or ()
        if other := sorted({*types} - LAYER_TYPES):
            raise _unsupported(f"{name} has layers of type {', '.join(other)}")
        try:
            error, windows = self._try()
        except ModelError:
            raise
        except Exception as problem:
            raise _unsupported(f"{name} has a forward that fails ({problem!r})") from problem
        # The limits are 7e-4 in float32 and 0.2 in bfloat16. With SmolLM2-135M rounding makes 1e-5 and
        # 1e-2.
        if error > 2 * math.sqrt(torch.finfo(self._model.dtype).eps):
            raise _unsupported(f"{name} has other logits if sequences are packed into a batch")
        if any(kind == SLIDING and windows.get(layer) is None for layer, kind in enumerate(types)):
            raise _unsupported(f"{name} has sliding windows that it does not pass to the attention function")

    @torch.inference_mode()
    def _try(self) -> tuple[float, Mapping[int, int | None]]:
        """Process two equal sequences in one batch: parts of their prompts in two forwards, then a token.

        Returns:
            The relative error of the logits, and the size of each layer's sliding window.
        """
        prompt = tuple(range(TRIED))
        # The plain implementation, which all models have.
        self._model.set_attn_implementation("eager")
        self._slots.assign([BASE_SLOT] * TRIED)
        expected = self._model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
        self._model.set_attn_implementation(ATTENTION)
        sequences = [Sequence(GenerationRequest(prompt, 1)) for _ in range(2)]
        for size in (TRIED - 3, 2, 1):
            batch = _Batch(
                [Chunk(one, i * size, size, size == one.uncached) for i, one in enumerate(sequences)]
            )
            logits = self._forward(batch)
            for sequence in sequences:
                sequence.cache.length += size
        return max(relative_error(row, expected) for row in logits), batch.windows


def _score_prompts(chunks: list[Chunk], logits: torch.Tensor) -> torch.Tensor:
    """Extend the log-probabilities of prompts, and return the logits after complete chunks."""
    first, lasts = 0, []
    for chunk in chunks:
        sequence, scored = chunk.sequence, chunk.scored
        end = first + len(scored)
        if scored:
            tokens = sequence.tokens[scored.start + 1 : scored.stop + 1]
            entries = logprobs(logits[first:end], tokens, [sequence.request.logprobs or 0] * len(tokens))
            sequence.finite &= all(entry and math.isfinite(entry.logprob) for entry in entries)
            sequence.prompt_logprobs += entries
        if chunk.complete:
            lasts.append(end)
        first = end + chunk.complete
    return logits[lasts]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence of a batch; the interface is transformers' own.

    Args:
        module: the attention layer.
        query: (1 × heads × N × key size).
        key: (1 × key heads × N × key size).
        value: (1 × key heads × N × value size).
        attention_mask: None, since transformers makes no mask for this function.
        scaling: factor of the scores; 1/√(key size) by default.
        sliding_window: number of last tokens that a token attends to, itself included; None for all.
        softcap: bound of the scores; None for none.
        options: further options, which must change nothing.

    Returns:
        The attention's output (1 × N × heads × value size), and no weights.

    Raises:
        ModelError: for an option that is not supported.
    """
    name = type(module).__name__
    _check_options(name, {**options, "attention_mask": attention_mask})
    layer, batch = module.layer_idx, _batch.get()
    if layer in batch.windows:
        raise _unsupported(f"{name} has attention several times in a layer")
    batch.windows[layer] = sliding_window
    (_, heads, total, size), key_heads = query.shape, key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    out = query.new_empty(1, total, heads, size)
    value_size = value.shape[-1]
    if value_size < size:
        value = functional.pad(value, (0, size - value_size))
    new = torch.cat((key, value))
    for chunk in batch.chunks:
        here = slice(chunk.start, chunk.end)
        k, v = chunk.sequence.cache.append(layer, new[:, :, here])
        if chunk.size == 1:
            # Grouped-query heads are folded into the query dimension: all of them see every key.
            if sliding_window is not None:
                k, v = k[:, :, -sliding_window:], v[:, :, -sliding_window:]
            # With three dimensions instead of four, the fused kernel is not used.
            q = query[:, :, chunk.start].view(1, key_heads, heads // key_heads, size)
            out[0, chunk.start] = _attend(q, k, v, None, scale, softcap).view(heads, size)
            continue
        k, v = (one.repeat_interleave(heads // key_heads, 1) for one in (k, v))
        mask = causal_mask(chunk.size, k.shape[2], sliding_window)
        out[0, here] = _attend(query[:, :, here], k, v, mask, scale, softcap)[0].transpose(0, 1)
    return out[..., :value_size], None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attend with as many heads of queries as of keys; where `mask` (queries × keys) is False, not at all."""
    if softcap is None:
        return functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return plain_attention(q, k, v, mask, scale, softcap)


def _check_options(module: str, options: Mapping[str, Any]) -> None:
    """Refuse options that would change what attention computes; dropout has no effect in evaluation."""
    unknown = unknown_options({name: given for name, given in options.items() if name != "dropout"})
    if options.get("is_causal") is False:
        raise _unsupported(f"{module} has attention to later tokens")
    if unknown:
        raise _unsupported(f"{module} has {FEATURES.get(unknown[0], unknown[0])}")


def _unsupported(what: str) -> ModelError:
    return ModelError(
        f"{what}, which the engine for CPUs does not support; serve the model with vLLM on a GPU "
        "(engine: vllm)"
    )


AttentionInterface.register(ATTENTION, _attention)

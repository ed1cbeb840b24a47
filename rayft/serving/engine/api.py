"""The contract between serving and its engines: one base, adapters by name, requests that share batches."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from rayft.artifacts import AdapterArtifact
from rayft.data.chat_format import ChatFormat
from rayft.errors import BadRequestError, ResourceError
from rayft.kernels.segment_lora import SlotFactors
from rayft.methods.base import LoraFactors

__all__ = [
    "Engine",
    "EngineLimits",
    "EngineStats",
    "GenerationRequest",
    "NoRoomError",
    "Progress",
    "TokenLogprob",
    "check_prompt",
    "end_tokens",
    "slot_factors",
]


@dataclass(frozen=True)
class GenerationRequest:
    """The tokens to continue, the adapter to use, and the options of sampling."""

    prompt: tuple[int, ...]
    """Ids of the prompt's tokens, at least one."""
    max_tokens: int
    """Largest number of tokens to generate; 0 only reads the prompt."""
    adapter: str | None = None
    """Name of a loaded adapter; None for the base."""
    rank: int | None = None
    """Lower rank at which a squeezed adapter is used; None for its own."""
    temperature: float = 0.0
    """Temperature; 0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    top_k: int = 0
    """Sample from this number of most likely tokens; 0 for all."""
    min_p: float = 0.0
    """Sample from the tokens whose probability is at least this fraction of the most likely token's."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the prompt and the text so far, and multiplies negative ones."""
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end this request, in addition to those that end every request."""
    seed: int | None = None
    """Seed of all sampling: the same request with the same seed gives the same tokens. None: the engine draws
    one."""
    logprobs: int | None = None
    """Number of most likely tokens to report beside each token's log-probability; None for neither."""
    score_prompt: bool = False
    """Whether to report the log-probabilities of the prompt's tokens too; this needs `logprobs`."""
    progress: bool = True
    """Whether to yield the progress while the request runs; otherwise only the end, which costs less."""
    json_schema: str | None = None
    """JSON schema, as JSON text, that the answer has to follow; None for any text."""


STOPPED = "the engine has stopped, and its replica is being replaced; try again"
NO_SCHEMA = (
    "this server's engine can't make an answer follow a JSON schema; leave response_format out, or serve "
    "with engine: vllm on a GPU"
)
NOT_FINITE = "the model computed NaN or Inf for this prompt; use another adapter, or serve with dtype float32"


@dataclass(frozen=True)
class EngineLimits:
    """The limits of one engine."""

    max_running: int
    """Largest number of requests in one forward."""
    max_batch_tokens: int
    """Largest number of tokens in one forward."""
    cache_tokens: int
    """Size of the KV cache for all requests, in tokens."""


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token by the model itself: before temperature and other options apply."""

    token: int
    """Id of the token."""
    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...]
    """Ids and log-probabilities of the most likely tokens, as many as the request asked for."""


@dataclass(frozen=True)
class Progress:
    """The state of a request after a step."""

    tokens: tuple[int, ...]
    """All generated tokens, without an end token."""
    generated: int
    """Number of generated tokens, including an end token."""
    finish: Literal["stop", "length"] | None = None
    """Why the request ended: an end token or the limit; None while it is running."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Log-probabilities of `tokens`, if the request asked for them."""
    prompt: tuple[TokenLogprob | None, ...] = ()
    """Log-probabilities of the prompt's tokens, if the request asked for them, once the prompt was read; the
    first one has none."""
    end: TokenLogprob | None = None
    """Log-probability of the end token, if the request ended with one and asked for them."""
    first_token_seconds: float | None = field(default=None, compare=False)
    """Time from the submission to the first token; None if the engine does not know it."""


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine started."""

    alive: bool
    """Whether the engine answers requests."""
    forwards: int
    """Number of forwards of the model."""
    tokens: int
    """Number of tokens that they processed, including prompts."""
    running: int
    """Number of requests that have not ended."""
    max_requests_in_forward: int
    """Largest number of requests that shared one forward."""
    max_slots_in_forward: int
    """Largest number of different adapters, counting the base as one, that shared one forward."""


class NoRoomError(ResourceError):
    """An adapter does not fit beside those that are loaded."""


class Engine(Protocol):
    """Generates for many requests at once; an engine is ready when its constructor returns."""

    def submit(self, request: GenerationRequest) -> AsyncGenerator[Progress, None]:
        """Generate, and yield the progress or the end; closing the iterator ends the request.

        Raises:
            BadRequestError: at once or during the iteration, if the engine can't do what is asked for, or the
                model does not have a token of the prompt.
            RequestError: during the iteration, if the engine fails.
        """

    async def load(self, name: str, artifact: AdapterArtifact) -> None:
        """Make an adapter usable under a new name, at its own rank and, if it was squeezed, at lower ones.

        A load that is cancelled leaves nothing, so the name is still new.

        Raises:
            NoRoomError: if another adapter has to be unloaded first.
        """

    def unload(self, name: str) -> None:
        """Free an adapter that no running request uses, at all its ranks."""

    def stats(self) -> EngineStats:
        """Return whether the engine is alive, and its counts."""

    def stop(self) -> None:
        """Fail all running requests, and free the model."""


def check_prompt(prompt: Sequence[int], vocabulary: int) -> None:
    """Refuse a prompt with a token that the model does not have: it would end the engine.

    Args:
        prompt: ids of tokens.
        vocabulary: number of tokens that the model has. Its tokenizer may have more.

    Raises:
        BadRequestError: naming the token.
    """
    if max(prompt) >= vocabulary:
        raise BadRequestError(
            f"the prompt has the token {max(prompt)}, which the tokenizer has but the model does not (it has "
            f"0 to {vocabulary - 1}); leave it out"
        )


def end_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: those of generation config, tokenizer and chat template."""
    configured = getattr(generation_config, "eos_token_id", None)
    found = set(configured if isinstance(configured, list) else [configured])
    return sorted({token for token in found if token is not None} | ChatFormat.of(tokenizer).end_ids)


def slot_factors(factors: LoraFactors) -> SlotFactors:
    """Return what the kernels use of a layer's factors: B, and A or, for a selector, its columns."""
    if factors.columns is not None:
        return SlotFactors(b=factors.b, scale=factors.scale, columns=torch.tensor(factors.columns))
    return SlotFactors(b=factors.b, scale=factors.scale, a=factors.a)

"""What serving needs of an engine: one base model, adapters by name, requests that share batches."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from rayft.data.chat_format import ChatFormat
from rayft.methods.base import LoraFactors
from rayft.models.load import LoadedModel

__all__ = [
    "Engine",
    "EngineLimits",
    "EngineStats",
    "GenerationRequest",
    "Progress",
    "TokenLogprob",
    "end_tokens",
]


@dataclass(frozen=True)
class GenerationRequest:
    """Tokens to continue, the adapter to do it with, and how."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_tokens: int
    """Most tokens to generate."""
    adapter: str | None = None
    """Name of a loaded adapter; None for the base."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this share of the probability."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """Draw from tokens that are at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens of the prompt and the text so far, and multiplies the others."""
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end this request, beside those that end all."""
    seed: int = 0
    """Decides every draw: the same request and seed give the same tokens."""
    logprobs: int | None = None
    """How many of the likeliest tokens to tell with each token's own log-probability; None for nothing."""


STOPPED = "the engine has stopped; its replica is about to be replaced, try again"
NOT_FINITE = "the model gave NaN or Inf for this prompt; use another adapter, or serve with dtype float32"


@dataclass(frozen=True)
class EngineLimits:
    """What one engine may hold."""

    max_running: int
    """Requests in one forward."""
    max_batch_tokens: int
    """Tokens in one forward."""
    cache_tokens: int
    """Tokens of keys and values, over all requests."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token: natural logarithms, before any option of the request."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, as many as were asked for."""


@dataclass(frozen=True)
class Progress:
    """How far a request has come."""

    tokens: tuple[int, ...]
    """All tokens so far, without the one that ended it."""
    generated: int
    """How many tokens were generated, the end token included."""
    finish: Literal["stop", "length"] | None = None
    """Why it ended: an end token or the limit; None while it runs."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """For each of `tokens`, where they were asked for."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it started."""

    alive: bool
    """Whether it answers requests."""
    forwards: int
    """Forwards of the model."""
    tokens: int
    """Tokens that went through them, prompts included."""
    running: int
    """Requests that have not ended."""
    max_requests_in_forward: int
    """Most requests that shared one forward."""
    max_slots_in_forward: int
    """Most different adapters, the base counted as one, that shared one forward."""


class Engine(Protocol):
    """Generates for many requests at once; an instance is ready when its constructor returns."""

    def submit(self, request: GenerationRequest) -> AsyncGenerator[Progress, None]:
        """Generate, giving progress as it comes; closing the iterator ends the request.

        Raises:
            RequestError: while iterating, if the engine fails.
        """

    def load(self, name: str, factors: Mapping[str, LoraFactors]) -> None:
        """Make an adapter usable under a name that is not in use."""

    def unload(self, name: str) -> None:
        """Free an adapter that no running request uses."""

    def stats(self) -> EngineStats:
        """Report health and work done."""

    def stop(self) -> None:
        """Fail what still runs and free the model."""


def end_tokens(loaded: LoadedModel) -> list[int]:
    """Return the tokens that end a text: the generation config's, the tokenizer's, the chat template's."""
    configured = getattr(loaded.model.generation_config, "eos_token_id", None)
    found = set(configured if isinstance(configured, list) else [configured])
    return sorted({token for token in found if token is not None} | ChatFormat.of(loaded.tokenizer).end_ids)

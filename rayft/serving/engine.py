"""The contract between serving and its engines: one base, adapters by name, requests that share batches."""

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
    """The tokens to continue, the adapter to use, and the options of sampling."""

    prompt: tuple[int, ...]
    """Ids of the prompt's tokens, at least one."""
    max_tokens: int
    """Largest number of tokens to generate."""
    adapter: str | None = None
    """Name of a loaded adapter; None for the base."""
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
    seed: int = 0
    """Seed of all sampling: the same request with the same seed gives the same tokens."""
    logprobs: int | None = None
    """Number of most likely tokens to report beside each token's log-probability; None for neither."""


STOPPED = "the engine has stopped, and its replica is being replaced; try again"
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


class Engine(Protocol):
    """Generates for many requests at once; an engine is ready when its constructor returns."""

    def submit(self, request: GenerationRequest) -> AsyncGenerator[Progress, None]:
        """Generate, and yield the progress after each step; closing the iterator ends the request.

        Raises:
            RequestError: during the iteration, if the engine fails.
        """

    def load(self, name: str, factors: Mapping[str, LoraFactors]) -> None:
        """Make an adapter usable under a new name."""

    def unload(self, name: str) -> None:
        """Free an adapter that no running request uses."""

    def stats(self) -> EngineStats:
        """Return whether the engine is alive, and its counts."""

    def stop(self) -> None:
        """Fail all running requests, and free the model."""


def end_tokens(loaded: LoadedModel) -> list[int]:
    """Return the tokens that end a text: those of generation config, tokenizer and chat template."""
    configured = getattr(loaded.model.generation_config, "eos_token_id", None)
    found = set(configured if isinstance(configured, list) else [configured])
    return sorted({token for token in found if token is not None} | ChatFormat.of(loaded.tokenizer).end_ids)

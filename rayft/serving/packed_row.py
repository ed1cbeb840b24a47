"""What the packed engine's parts share: its requests, which tokens a forward reads, the way to attention."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from rayft.errors import ModelError, RayftError
from rayft.serving.engine import GenerationRequest, Progress, TokenLogprob
from rayft.serving.sampling import Seen

__all__ = ["ATTENTION", "PAGE", "Attend", "Forward", "Part", "Row", "RowCache", "pages", "running"]

ATTENTION = "rayft_packed"
"""What transformers knows the attention by."""
PAGE = 64
"""Tokens by which a request's keys and values grow."""


class RowCache:
    """One request's keys and values."""

    def __init__(self) -> None:
        self.length = 0
        """Tokens in it; set when a forward is over, for its layers come one after the other."""


@dataclass(eq=False)
class Row:
    """A request in the engine."""

    request: GenerationRequest
    slot: int
    loop: asyncio.AbstractEventLoop
    progress: asyncio.Queue[Progress | RayftError]
    tokens: list[int]
    """Prompt and what was generated."""
    cache: RowCache
    seen: Seen | None = None
    """The row's tokens, where its request has a repetition penalty."""
    scored: list[TokenLogprob] = field(default_factory=list)
    ended: bool = False

    @property
    def unread(self) -> int:
        """Tokens whose keys and values are not there yet."""
        return len(self.tokens) - self.cache.length

    @property
    def made(self) -> int:
        """Tokens that were generated."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True)
class Part:
    """A row's tokens in a forward."""

    row: Row
    start: int
    end: int

    @property
    def new(self) -> int:
        """How many there are."""
        return self.end - self.start

    @property
    def complete(self) -> bool:
        """Whether the row's tokens are all read by it."""
        return self.new == self.row.unread


class Forward(Protocol):
    """Runs the model over parts of requests; it is used from one thread at a time."""

    layers: set[int]
    """Layers whose attention it computed."""

    def fresh(self) -> RowCache:
        """Give a request a place for its keys and values."""

    def release(self, cache: RowCache) -> None:
        """Take the place back."""

    def logits(self, parts: Sequence[Part]) -> torch.Tensor:
        """Run the model: the logits after the last token of each complete part (parts × V)."""


def pages(tokens: int) -> int:
    """Round up to whole pages."""
    return -(-tokens // PAGE) * PAGE


Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float | None, int | None], torch.Tensor]
"""Layer, query (1 × heads × N × size), key and value with their own heads, scale, window; gives
(1 × N × heads × size)."""


class _Running(threading.local):
    """The forward that runs now in a thread."""

    def __init__(self) -> None:
        self.attend: Attend | None = None
        self.layers: set[int] = set()


running = _Running()


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each request, as the forward that runs does it.

    There is no mask: transformers makes none for functions that it doesn't know.

    Raises:
        ModelError: if the model asks for what is not computed here.
    """
    assert attention_mask is None
    _check_options(options)
    assert running.attend is not None
    running.layers.add(module.layer_idx)
    return running.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


def _check_options(options: Mapping[str, Any]) -> None:
    known = {"dropout", "position_ids", "is_causal", "use_cache", "output_attentions"}
    other = [name for name, given in options.items() if given is not None and name not in known]
    if other:
        raise ModelError(
            f"attention with {', '.join(other)} is not known to this engine; set engine: transformers"
        )


AttentionInterface.register(ATTENTION, _attention)

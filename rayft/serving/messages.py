"""What passes between ingress and replicas.

Nothing heavy is imported here nor in the other modules that the ingress needs: its process does
without torch, which spares 0.3 GB and some seconds at every start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BASE_NAME", "NAME", "Delta", "ModelCard", "TokenScore"]

BASE_NAME = "base"
"""The `model` of a request that wants no adapter (the base's own name does as well)."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What an adapter may be called."""


@dataclass(frozen=True)
class TokenScore:
    """A token of an answer and how likely the model found it."""

    text: str
    bytes: tuple[int, ...]
    """Its bytes: a token may be part of a character."""
    logprob: float
    top: tuple[TokenScore, ...] = ()
    """The likeliest tokens at its place."""


@dataclass(frozen=True)
class Delta:
    """A piece of an answer; the first one of an accepted request has no text."""

    text: str
    """New text."""
    prompt_tokens: int
    """Tokens of the prompts."""
    completion_tokens: int
    """Tokens of this choice generated so far."""
    finish: Literal["stop", "length"] | None = None
    """Why the answer ended; None while it goes on."""
    index: int = 0
    """Which choice it is of."""
    scores: tuple[TokenScore, ...] = ()
    """The new tokens' log-probabilities, where they were asked for."""
    reasoning: str = ""
    """New text of the think block before the answer of a chat."""
    fingerprint: str = ""
    """Of the first: the content hash of the adapter that answers; empty for the base."""


@dataclass(frozen=True)
class ModelCard:
    """What `/v1/models` tells of one name."""

    id: str
    """The name to put into the `model` field."""
    root: str
    """The base's name, or the adapter's folder."""
    base: str | None = None
    """The base that an adapter is for; None for the base itself."""
    rank: int | None = None
    """Largest rank of an adapter's modules."""
    method: str | None = None
    """The method that trained it."""
    parameters: int | None = None
    """Numbers in its factors."""
    bytes: int | None = None
    """Size of its weights on disk."""
    content_hash: str | None = None
    """Identity of its factors."""
    parent: str | None = None
    """Content hash of the adapter that it was squeezed from."""
    squeezed: bool | None = None
    """Whether `id@rK` serves it at a lower rank K."""
    version: int | None = None
    """`id@version` means it whatever `id` comes to mean."""
    aliases: tuple[str, ...] = ()
    """`id@alias` means it, as long as the registry's alias stays."""
    source: str | None = None
    """What it was loaded from."""
    pinned: bool | None = None
    """Whether it stays on the device."""
    score: float | None = None
    """Its validation score, where the registry knows it."""
    unavailable: str | None = None
    """Why it can't be served; None where it can."""

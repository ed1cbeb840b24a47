"""Values that ingress and replicas exchange.

Neither this module nor the others that the ingress needs import torch, which saves its process 0.3 GB and
some seconds at every start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BASE_NAME", "NAME", "Delta", "ModelCard", "TokenScore"]

BASE_NAME = "base"
"""The `model` of a request without an adapter; the base's own name denotes the same."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Regular expression of the names that an adapter may have."""


@dataclass(frozen=True)
class TokenScore:
    """A token of an answer and its log-probability."""

    text: str
    """The token as text."""
    bytes: tuple[int, ...]
    """The token as bytes: it may be a part of a character."""
    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[TokenScore, ...] = ()
    """The most likely tokens at its position."""


@dataclass(frozen=True)
class Delta:
    """A part of an answer; the first one of an accepted request has no text."""

    text: str
    """New text."""
    prompt_tokens: int
    """Number of tokens in the prompts."""
    completion_tokens: int
    """Number of tokens of this choice that have been generated so far."""
    finish: Literal["stop", "length"] | None = None
    """Why the answer ended; None while it continues."""
    index: int = 0
    """Index of the choice that it belongs to."""
    scores: tuple[TokenScore, ...] = ()
    """Log-probabilities of the new tokens, if the request asked for them."""
    reasoning: str = ""
    """New text of the reasoning before the answer of a chat."""
    fingerprint: str = ""
    """In the first delta: content hash of the adapter that answers; empty for the base."""


@dataclass(frozen=True)
class ModelCard:
    """Description of one model in `/v1/models`; None where something is unknown or does not apply."""

    id: str
    """Name to put into the `model` field."""
    root: str
    """The base's name, or the adapter's folder."""
    base: str | None = None
    """The base of an adapter; None for the base itself."""
    rank: int | None = None
    """Largest rank among the adapter's modules."""
    method: str | None = None
    """The method that trained it."""
    parameters: int | None = None
    """Number of values in its factors."""
    bytes: int | None = None
    """Size of its weights on disk."""
    content_hash: str | None = None
    """Content hash of its factors."""
    parent: str | None = None
    """Content hash of the adapter that it was squeezed from."""
    squeezed: bool | None = None
    """Whether it can be served at a lower rank K, as `id@rK`."""
    version: int | None = None
    """Number of the version, which `id@version` always denotes."""
    aliases: tuple[str, ...] = ()
    """Aliases that the registry has for the version, for `id@alias`."""
    source: str | None = None
    """Where it was loaded from."""
    pinned: bool | None = None
    """Whether it stays on the device."""
    score: float | None = None
    """Validation score, if the registry has one."""
    unavailable: str | None = None
    """Why it can't be served; None if it can."""

"""Values that ingress and replicas exchange.

Neither this module nor the others that the ingress needs import torch, which saves its process 0.3 GB and
some seconds at every start.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field

# pydantic wants this one's before Python 3.12.
from typing_extensions import TypedDict

__all__ = [
    "BASE_NAME",
    "NAME",
    "Count",
    "Delta",
    "ModelCard",
    "TokenScore",
    "check_name",
    "joined",
    "plain_name",
]

BASE_NAME = "base"
"""The `model` of a request without an adapter; the base's own name denotes the same."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Regular expression of the names that an adapter may have."""

Count = Annotated[int, Field(ge=0)]


def check_name(name: str) -> str:
    """Return a name unchanged, after checking that an adapter can be served under it.

    Raises:
        ValueError: if none can.
    """
    if name == BASE_NAME:
        raise ValueError(f"'{BASE_NAME}' is the base itself; use another name for the adapter")
    if not re.fullmatch(NAME, name):
        raise ValueError(
            f"'{name}' can't be an adapter's name: use letters from a to z, digits, '.', '_' and '-', and "
            "begin with a letter or digit ('@' is for ranks, as in name@r8)"
        )
    return name


def plain_name(text: str, instead: str) -> str:
    """Return a name like the text under which an adapter can be served, or `instead` if nothing is left."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    return plain if plain not in ("", BASE_NAME) else instead


@dataclass(frozen=True)
class TokenScore:
    """A token and its log-probability."""

    # In JSON too, a probability may be 0.
    __pydantic_config__ = ConfigDict(ser_json_inf_nan="constants")

    text: str
    """The token as text."""
    bytes: tuple[int, ...]
    """The token as bytes: it may be a part of a character."""
    logprob: float | None
    """Natural logarithm of its probability; None for the first token of a prompt, which has none."""
    top: tuple[TokenScore, ...] = ()
    """The most likely tokens at its position."""


@dataclass(frozen=True)
class Delta:
    """A part of an answer; the first one of an accepted request has no text."""

    text: str
    """New text; the first of a choice begins with the prompt if the request asked for that."""
    prompt_tokens: int
    """Number of tokens in the prompts."""
    completion_tokens: int
    """Number of tokens of this choice that have been generated so far."""
    finish: Literal["stop", "length"] | None = None
    """Why the answer ended; None while it continues."""
    index: int = 0
    """Index of the choice that it belongs to."""
    scores: tuple[TokenScore, ...] = ()
    """Log-probabilities of the tokens of `text`, if the request asked for them."""
    reasoning: str = ""
    """New text of the reasoning before the answer of a chat."""
    fingerprint: str = ""
    """In the first delta: content hash of the adapter that answers; empty for the base."""
    offsets: tuple[int, ...] = ()
    """Where in the whole text each token of `scores` begins, in characters."""


def joined(parts: Sequence[Delta]) -> Delta:
    """Return the parts of one choice as one: the whole text, and the counts and the finish of the last."""
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        reasoning="".join(part.reasoning for part in parts),
        scores=tuple(score for part in parts for score in part.scores),
        offsets=tuple(offset for part in parts for offset in part.offsets),
    )


class ModelCard(TypedDict):
    """Description of one model in `/v1/models`; a field that is unknown or does not apply is left out."""

    id: str
    """Name to put into the `model` field."""
    root: str
    """The base's name, or the adapter's folder."""
    base: NotRequired[str]
    """The base of an adapter; the base itself lacks this field."""
    base_revision: NotRequired[str]
    """Branch, tag or commit of the base on the hub, if one was set."""
    base_fingerprint: NotRequired[str]
    """Fingerprint of the base's weights."""
    max_model_len: NotRequired[Count]
    """Most tokens of a prompt and its answer together, under vLLM's name for it."""
    rank: NotRequired[Count]
    """Largest rank among the adapter's modules."""
    method: NotRequired[str]
    """The method that trained it."""
    parameters: NotRequired[Count]
    """Number of values in its factors."""
    bytes: NotRequired[Count]
    """Size of its weights on disk."""
    content_hash: NotRequired[str]
    """Content hash of its factors."""
    parent: NotRequired[str]
    """Content hash of the adapter that it was squeezed from."""
    squeezed: NotRequired[bool]
    """Whether it can be served at a lower rank K, as `id@rK`."""
    version: NotRequired[Annotated[int, Field(ge=1)]]
    """Number of the version, which `id@version` always denotes."""
    aliases: NotRequired[list[str]]
    """Aliases that the registry has for the version, for `id@alias`."""
    source: NotRequired[str]
    """Where it was loaded from."""
    pinned: NotRequired[bool]
    """Whether it stays on the device."""
    score: NotRequired[float]
    """Validation score, if the registry has one."""
    unavailable: NotRequired[str]
    """Why it can't be served."""

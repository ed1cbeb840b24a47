"""The types of what is answered, for the OpenAPI document; `answers` and `ingress` write them."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field

# pydantic wants this one's before Python 3.12.
from typing_extensions import TypedDict

__all__ = [
    "AdapterDeleted",
    "AdapterDeployed",
    "AdapterList",
    "AdapterVersions",
    "ChatCompletion",
    "Completion",
    "ErrorAnswer",
    "Health",
    "ModelEntry",
    "ModelList",
    "NotReady",
    "Readiness",
]

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: Annotated[str, Field(min_length=1)]
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    """The field at fault, if it is one's."""
    code: str | None


class ErrorAnswer(TypedDict):
    """Every status from 400 on."""

    error: ErrorDetail


class Usage(TypedDict):
    """Tokens over all choices."""

    prompt_tokens: Annotated[int, Field(ge=1)]
    completion_tokens: Count
    total_tokens: Count


class TopScore(TypedDict):
    """A token and how likely it was."""

    token: str
    logprob: Annotated[float, Field(le=0)]
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ChatScore(TopScore):
    """A token of a chat's answer, and the likeliest ones at its place."""

    top_logprobs: list[TopScore]


class ChatScores(TypedDict):
    """Log-probabilities of a chat's answer."""

    content: list[ChatScore]
    refusal: None


class TextScores(TypedDict):
    """Log-probabilities of a text: a list for each field."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[Count]


class ChatMessage(TypedDict):
    """What a chat is answered."""

    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning_content: str | None
    """What the model wrote in a think block before its answer."""


class Choice(TypedDict):
    """One of the answers to a request."""

    index: Count
    finish_reason: Literal["stop", "length"]


class ChatChoice(Choice):
    """One answer to a chat."""

    message: ChatMessage
    logprobs: ChatScores | None


class TextChoice(Choice):
    """One continuation of a text."""

    text: str
    logprobs: TextScores | None


class Generated(TypedDict):
    """What answers to chats and to texts have in common."""

    id: str
    created: Count
    """Seconds since 1970."""
    model: str
    system_fingerprint: str | None
    """Content hash of the adapter that answered; null for the base."""
    usage: Usage


class ChatCompletion(Generated):
    """What `/v1/chat/completions` answers, unless it streams."""

    object: Literal["chat.completion"]
    choices: Annotated[list[ChatChoice], Field(min_length=1)]


class Completion(Generated):
    """What `/v1/completions` answers, unless it streams."""

    object: Literal["text_completion"]
    choices: Annotated[list[TextChoice], Field(min_length=1)]


class Card(TypedDict):
    """What is told of the base or of an adapter; what is not known of one is left out."""

    id: str
    root: str
    created: Count
    owned_by: str
    base: NotRequired[str]
    rank: NotRequired[Count]
    method: NotRequired[str]
    parameters: NotRequired[Count]
    bytes: NotRequired[Count]
    content_hash: NotRequired[str]
    parent: NotRequired[str]
    squeezed: NotRequired[bool]
    version: NotRequired[Annotated[int, Field(ge=1)]]
    aliases: NotRequired[list[str]]
    source: NotRequired[str]
    pinned: NotRequired[bool]
    score: NotRequired[float]
    unavailable: NotRequired[str]
    """Why it can't be served."""


class ModelEntry(Card):
    """An entry of `/v1/models`."""

    object: Literal["model"]


class ModelList(TypedDict):
    """What `/v1/models` answers."""

    object: Literal["list"]
    data: list[ModelEntry]


class Traffic(TypedDict):
    """What a version did on all replicas since they started."""

    requests: Count
    tokens: Count
    errors: Count


class AdapterEntry(Card):
    """One version of an adapter."""

    object: Literal["adapter"]
    weight: Share
    tiers: list[Literal["device", "host", "disk", "unavailable"]]
    """Where each replica has it."""
    traffic: Traffic


class AdapterList(TypedDict):
    """What `/v1/adapters` answers."""

    object: Literal["list"]
    data: list[AdapterEntry]
    change: Count
    """Number of the last change."""
    refused: NotRequired[str | None]
    """For admins: why the last change was refused, if it was."""


class AdapterVersions(TypedDict):
    """What `/v1/adapters/{name}` answers."""

    object: Literal["adapter"]
    id: str
    versions: Annotated[list[AdapterEntry], Field(min_length=1)]


class AdapterDeleted(TypedDict):
    """What an unload answers."""

    object: Literal["adapter"]
    id: str
    deleted: Literal[True]


class AdapterDeployed(TypedDict):
    """The version that a change put into service."""

    name: str
    version: Annotated[int, Field(ge=1)]
    folder: str
    content_hash: str
    source: str
    aliases: list[str]
    pinned: bool
    score: float | None


class EngineHealth(TypedDict):
    """What a replica's engine has done."""

    alive: bool
    forwards: Count
    tokens: Count
    running: Count
    max_requests_in_forward: Count
    max_slots_in_forward: Count


class Health(TypedDict):
    """What `/healthz` answers."""

    status: Literal["ok"]
    engine: EngineHealth | None
    """A replica's; null where none is up."""


class Readiness(TypedDict):
    """What `/readyz` answers when requests can be answered."""

    status: Literal["ready"]
    change: Count
    unavailable: Count
    """Versions of adapters that a replica can't load."""


class NotReady(TypedDict):
    """What `/readyz` answers when they can't."""

    status: Literal["not ready"]
    reason: str

"""The bodies of answers as typed dictionaries, against which FastAPI validates what the routes return."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field

# pydantic wants this one's before Python 3.12.
from typing_extensions import TypedDict

from rayft.serving.messages import Count, ModelCard

__all__ = [
    "AdapterDeleted",
    "AdapterEntry",
    "AdapterList",
    "AdapterVersions",
    "ChatCompletion",
    "Completion",
    "ErrorAnswer",
    "Health",
    "Listed",
    "ModelEntry",
    "ModelList",
    "NotReady",
    "Readiness",
    "Usage",
]

Share = Annotated[float, Field(gt=0, le=1)]


class ErrorDetail(TypedDict):
    """The description of an error."""

    message: Annotated[str, Field(min_length=1)]
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    """The field at fault, if there is one."""
    code: str | None


class ErrorAnswer(TypedDict):
    """The body of every answer with a status of 400 or above."""

    error: ErrorDetail


class Usage(TypedDict):
    """Number of tokens over all choices."""

    prompt_tokens: Annotated[int, Field(ge=1)]
    completion_tokens: Count
    total_tokens: Count


class TopScore(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: Annotated[float, Field(le=0)]
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ChatScore(TopScore):
    """A token of a chat's answer, and the most likely tokens at its position."""

    top_logprobs: list[TopScore]


class ChatScores(TypedDict):
    """The log-probabilities of a chat's answer."""

    content: list[ChatScore]
    refusal: None


class TextScores(TypedDict):
    """The log-probabilities of a text, as one list for each field; null for the first token of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class ChatMessage(TypedDict):
    """The message that answers a chat."""

    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning_content: str | None
    """The text of the model's think block before its answer."""


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
    """The fields that the answers of both completion endpoints share."""

    id: str
    created: Count
    """Seconds since 1970."""
    model: str
    system_fingerprint: str | None
    """Content hash of the adapter that generated the answer; null for the base."""
    usage: Usage


class ChatCompletion(Generated):
    """The answer of `/v1/chat/completions`, unless it is streamed."""

    object: Literal["chat.completion"]
    choices: Annotated[list[ChatChoice], Field(min_length=1)]


class Completion(Generated):
    """The answer of `/v1/completions`, unless it is streamed."""

    object: Literal["text_completion"]
    choices: Annotated[list[TextChoice], Field(min_length=1)]


class Listed(ModelCard):
    """The fields that the entries of both lists share."""

    created: Count
    """Seconds since 1970."""
    owned_by: str


class ModelEntry(Listed):
    """An entry of `/v1/models`."""

    object: Literal["model"]


class ModelList(TypedDict):
    """The answer of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelEntry]


class Traffic(TypedDict):
    """Counts of a version over all replicas since they started."""

    requests: Count
    tokens: Count
    errors: Count


class AdapterEntry(Listed):
    """One version of an adapter."""

    object: Literal["adapter"]
    weight: Share
    tiers: list[Literal["device", "host", "disk", "unavailable"]]
    """Where each replica has the adapter."""
    traffic: Traffic


class AdapterList(TypedDict):
    """The answer of `/v1/adapters`."""

    object: Literal["list"]
    data: list[AdapterEntry]
    change: Count
    """Number of the last change."""
    refused: NotRequired[str | None]
    """For admins: the reason if the last change was refused, else null."""


class AdapterVersions(TypedDict):
    """The answer of `/v1/adapters/{name}`."""

    object: Literal["adapter"]
    id: str
    versions: Annotated[list[AdapterEntry], Field(min_length=1)]


class AdapterDeleted(TypedDict):
    """The answer to an unload."""

    object: Literal["adapter"]
    id: str
    deleted: Literal[True]


class EngineHealth(TypedDict):
    """Counts of a replica's engine since it started."""

    alive: bool
    forwards: Count
    tokens: Count
    running: Count
    max_requests_in_forward: Count
    max_slots_in_forward: Count


class Health(TypedDict):
    """The answer of `/healthz`."""

    status: Literal["ok"]
    engine: EngineHealth | None
    """The engine of one replica; null if no replica is up, or for callers without a key."""


class Readiness(TypedDict):
    """The answer of `/readyz` if requests can be answered."""

    status: Literal["ready"]
    change: Count
    """Number of the last change."""
    unavailable: Count
    """Number of adapter versions that some replica can't load."""


class NotReady(TypedDict):
    """The answer of `/readyz` if requests can't be answered."""

    status: Literal["not ready"]
    reason: str

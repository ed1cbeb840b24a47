"""OpenAI's request types, as far as they can be answered; the rest is refused, not ignored.

Fields that nothing depends on (`user`, `metadata`, …) are let through, since clients send many.
Those that would change the answer and aren't supported are refused with a 400 that names them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayft.errors import BadRequestError
from rayft.serving.allowed import check_allowed
from rayft.serving.messages import BASE_NAME, NAME

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "LoadRequest",
    "Message",
    "StreamOptions",
    "TextRequest",
    "parse_request",
]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields of OpenAI's that are not supported → the values that ask for nothing (null always does)."""


class StreamOptions(BaseModel):
    """What a stream holds beside the text."""

    include_usage: bool = False
    """End with a chunk that counts tokens."""


class TextRequest(BaseModel):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())
    default_max_tokens: ClassVar[int | None] = None
    """Tokens where no limit is given, as far as they fit; None for as many as fit."""

    model: str
    """A served name."""
    stream: bool = False
    """Answer by server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token; 1 where it is not given."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the likeliest tokens that hold this share of the probability."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Decides every draw; drawn itself where it is not given."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Answers to each prompt, drawn apart; 1 where it is not given."""
    stop: str | list[str] | None = None
    """Strings that end the text (and are not part of it); at most four, as OpenAI allows."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for field, neutral in NEUTRAL.items():
                value = data.get(field)
                if value is not None and not any(_same(value, allowed) for allowed in neutral):
                    raise BadRequestError(
                        f"'{field}' is not supported here; leave it out or send {json.dumps(neutral[0])}",
                        param=field,
                    )
        return data

    @model_validator(mode="after")
    def _consistent(self) -> TextRequest:
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("'stream_options' needs 'stream': true", param="stream_options")
        if len(self.stops) > 4 or "" in self.stops:
            raise BadRequestError("'stop' takes up to 4 strings, none of them empty", param="stop")
        return self

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens to tell with each token's log-probability; None for nothing."""
        raise NotImplementedError

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, where the request says so."""
        return self.max_tokens


RequestT = TypeVar("RequestT", bound=BaseModel)


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """Give the turn as chat templates want it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatRequest(TextRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Tell each token's log-probability."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Only with `logprobs`: also those of this many of the likeliest tokens."""

    @model_validator(mode="after")
    def _scores(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
        return self

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens to tell with each token's log-probability; None for nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, where the request says so."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(TextRequest):
    """The body of `/v1/completions`."""

    default_max_tokens: ClassVar[int | None] = 16

    prompt: str | list[int] | Annotated[list[str] | list[list[int]], Field(min_length=1, max_length=128)]
    """A text or token ids, or several of them."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Tell each token's log-probability, and those of this many of the likeliest tokens."""

    @property
    def scored(self) -> int | None:
        """How many of the likeliest tokens to tell with each token's log-probability; None for nothing."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


class LoadRequest(BaseModel):
    """The body of `POST /v1/adapters`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=f"^{NAME}$", max_length=128)]
    """What it is called in the `model` field of requests."""
    source: Annotated[str, Field(min_length=1, max_length=4096)]
    """A folder, `models:/name@alias`, `models:/name/3`, or a URL."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the name's traffic; below 1 it is a canary beside what is served."""
    pinned: bool = False
    """Keep it on the device."""

    def check(self, roots: Sequence[str]) -> None:
        """Refuse names and places that may not be used.

        Raises:
            BadRequestError: saying why.
        """
        if self.name == BASE_NAME:
            raise BadRequestError(f"'{BASE_NAME}' is the base itself; take another name", param="name")
        check_allowed(self.source, roots)


def _same(value: object, allowed: object) -> bool:
    # In Python 0 is False, but "logprobs": 0 asks for something and "logprobs": false does not.
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def parse_request(cls: type[RequestT], body: bytes) -> RequestT:
    """Read a request's body.

    Raises:
        BadRequestError: if it is no JSON, or a field is missing, wrong or not supported.
    """
    try:
        data = json.loads(body)
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadRequestError(f"the body must be a JSON object, not {type(data).__name__}")
    try:
        return cls.model_validate(data, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        where = [str(part) for part in problem["loc"]]
        param = where[0] if where else None
        if problem["type"] == "missing":
            raise BadRequestError(f"'{'.'.join(where)}' is missing", param=param) from error
        raise BadRequestError(f"'{'.'.join(where)}': {problem['msg']}", param=param) from error

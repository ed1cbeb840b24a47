"""OpenAI's shapes of answers: whole ones, streams and errors."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayTaskError
from starlette.exceptions import HTTPException

from rayft.errors import RayftError, RequestError
from rayft.serving.messages import Delta

__all__ = ["ChatForm", "Form", "TextForm", "describe_error", "events"]


def _error(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """Write an error as OpenAI does."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Give the status and body that answer an error, wherever it was raised."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RequestError):
        return cause.status, _error(cause.status, str(cause), cause.param, cause.code)
    if isinstance(cause, HTTPException):
        return cause.status_code, _error(cause.status_code, str(cause.detail), None, None)
    if isinstance(cause, RayftError):
        return 503, _error(503, str(cause), None, "unavailable")
    message = f"{type(cause).__name__} inside the server; see its log"
    return 500, _error(500, message, None, "internal_error")


class Form(ABC):
    """The shape of an answer: what differs between chat and plain completions."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str) -> None:
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    @abstractmethod
    def opening(self) -> dict[str, Any] | None:
        """Give the choice that opens a stream, if there is one."""

    @abstractmethod
    def piece(self, text: str) -> dict[str, Any]:
        """Give the part of a streamed choice that holds text."""

    @abstractmethod
    def full(self, text: str) -> dict[str, Any]:
        """Give the part of a whole choice that holds text."""

    def chunk(self, choice: dict[str, Any] | None, finish: str | None = None, **extra: Any) -> dict[str, Any]:
        """Write one event of a stream."""
        choices = [] if choice is None else [_choice(choice, finish)]
        return {**self._head(self.chunk_object), "choices": choices, **extra}

    def whole(self, text: str, last: Delta) -> dict[str, Any]:
        """Write a whole answer."""
        choices = [_choice(self.full(text), last.finish)]
        return {**self._head(self.object), "choices": choices, "usage": _usage(last)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}


class ChatForm(Form):
    """Answers of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> dict[str, Any] | None:
        """Name the speaker."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, text: str) -> dict[str, Any]:
        """Give a delta."""
        return {"delta": {"content": text} if text else {}}

    def full(self, text: str) -> dict[str, Any]:
        """Give a message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


class TextForm(Form):
    """Answers of `/v1/completions`."""

    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def opening(self) -> dict[str, Any] | None:
        """Give nothing: a text has no speaker."""
        return None

    def piece(self, text: str) -> dict[str, Any]:
        """Give text."""
        return {"text": text}

    def full(self, text: str) -> dict[str, Any]:
        """Give text."""
        return {"text": text}


async def events(form: Form, first: Delta, deltas: AsyncIterator[Delta], usage: bool) -> AsyncIterator[str]:
    """Write a stream of server-sent events; an error after the first one becomes an event."""
    opening, last = form.opening(), first
    if opening is not None:
        yield _event(form.chunk(opening))
    try:
        async for delta in deltas:
            last = delta
            yield _event(form.chunk(form.piece(delta.text), delta.finish))
    except Exception as error:  # noqa: BLE001  (the headers are sent: this is the only way to tell)
        yield _event(describe_error(error)[1])
        return
    if usage:
        yield _event(form.chunk(None, usage=_usage(last)))
    yield "data: [DONE]\n\n"


def _choice(part: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, **part, "logprobs": None, "finish_reason": finish}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _usage(last: Delta) -> dict[str, int]:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
    }

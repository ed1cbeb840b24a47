"""OpenAI's shapes of answers: whole ones, streams and errors."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.exceptions import HTTPException

from rayft.errors import RayftError, RequestError
from rayft.serving.messages import Delta, TokenScore

__all__ = ["ChatForm", "Form", "TextForm", "collected", "describe_error", "events", "usage"]


LONGEST_MESSAGE = 4000
"""Characters of an error's message: it may quote a name or a list that has no end."""


def _error(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """Write an error as OpenAI does."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]} …"
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
    if isinstance(cause, (RayActorError, DeploymentUnavailableError)):
        return 503, _error(503, "the replica that was to answer was lost; try again", None, "unavailable")
    message = f"{type(cause).__name__} inside the server; see its log"
    return 500, _error(500, message, None, "internal_error")


class Form(ABC):
    """The shape of an answer: what differs between chat and plain completions."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str) -> None:
        self.fingerprint = ""
        """Content hash of the adapter that answers."""
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    @abstractmethod
    def opening(self) -> dict[str, Any] | None:
        """Give the part that opens each choice of a stream, if there is one."""

    @abstractmethod
    def piece(self, delta: Delta) -> dict[str, Any]:
        """Return the part of a streamed choice that holds its text."""

    @abstractmethod
    def full(self, delta: Delta) -> dict[str, Any]:
        """Return the part of a whole choice that holds its text."""

    @abstractmethod
    def scores(self, scores: Sequence[TokenScore], offset: int) -> dict[str, Any]:
        """Write log-probabilities of tokens; `offset` is how many characters came before them."""

    def chunk(self, choice: dict[str, Any] | None, **extra: Any) -> dict[str, Any]:
        """Write one event of a stream."""
        return {**self._head(self.chunk_object), "choices": [] if choice is None else [choice], **extra}

    def choice(self, part: dict[str, Any], delta: Delta, offset: int = 0) -> dict[str, Any]:
        """Write a choice, or a part of one."""
        scores = self.scores(delta.scores, offset) if delta.scores else None
        return {"index": delta.index, **part, "logprobs": scores, "finish_reason": delta.finish}

    def whole(self, choices: Mapping[int, Delta]) -> dict[str, Any]:
        """Write a whole answer from each choice's text, its scores and its end."""
        made = [self.choice(self.full(delta), delta) for _, delta in sorted(choices.items())]
        return {**self._head(self.object), "choices": made, "usage": usage(choices)}

    def _head(self, kind: str) -> dict[str, Any]:
        known = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**known, "system_fingerprint": self.fingerprint or None}


class ChatForm(Form):
    """Answers of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> dict[str, Any] | None:
        """Name the speaker."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, delta: Delta) -> dict[str, Any]:
        """Return a delta."""
        parts = {"reasoning_content": delta.reasoning, "content": delta.text}
        return {"delta": {name: text for name, text in parts.items() if text}}

    def full(self, delta: Delta) -> dict[str, Any]:
        """Return a message; `reasoning_content` is null where a model did not reason."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"message": {**message, "reasoning_content": delta.reasoning or None}}

    def scores(self, scores: Sequence[TokenScore], offset: int) -> dict[str, Any]:
        """Give a list of tokens."""
        found = [{**_score(one), "top_logprobs": [_score(top) for top in one.top]} for one in scores]
        return {"content": found, "refusal": None}


class TextForm(Form):
    """Answers of `/v1/completions`."""

    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def opening(self) -> dict[str, Any] | None:
        """Give nothing: a text has no speaker."""
        return None

    def piece(self, delta: Delta) -> dict[str, Any]:
        """Return text."""
        return {"text": delta.text}

    def full(self, delta: Delta) -> dict[str, Any]:
        """Return text."""
        return {"text": delta.text}

    def scores(self, scores: Sequence[TokenScore], offset: int) -> dict[str, Any]:
        """Give a list for each field."""
        starts = accumulate((len(one.text) for one in scores[:-1]), initial=offset)
        return {
            "tokens": [one.text for one in scores],
            "token_logprobs": [one.logprob for one in scores],
            "top_logprobs": [{top.text: top.logprob for top in one.top} for one in scores],
            "text_offset": list(starts),
        }


async def collected(first: Delta, deltas: AsyncIterator[Delta]) -> dict[int, Delta]:
    """Put the pieces of each choice together: its index → its text and reasoning, its scores, its end."""
    whole: dict[int, Delta] = {}
    async for delta in deltas:
        before = whole.get(delta.index, first)
        whole[delta.index] = replace(
            delta,
            text=before.text + delta.text,
            scores=before.scores + delta.scores,
            reasoning=before.reasoning + delta.reasoning,
        )
    return whole


async def events(form: Form, first: Delta, deltas: AsyncIterator[Delta], counts: bool) -> AsyncIterator[str]:
    """Write a stream of server-sent events; an error after the first one becomes an event."""
    opening, lasts, offsets = form.opening(), {0: first}, Counter[int]()
    begun: set[int] = set()
    try:
        async for delta in deltas:
            if opening is not None and delta.index not in begun:
                begun.add(delta.index)
                yield _event(form.chunk(form.choice(opening, Delta("", 0, 0, index=delta.index))))
            lasts[delta.index] = delta
            yield _event(form.chunk(form.choice(form.piece(delta), delta, offsets[delta.index])))
            offsets[delta.index] += len(delta.text)
    except Exception as error:  # noqa: BLE001  (the headers are sent: this is the only way to tell)
        yield _event(describe_error(error)[1])
        return
    if counts:
        yield _event(form.chunk(None, usage=usage(lasts)))
    yield "data: [DONE]\n\n"


def usage(choices: Mapping[int, Delta]) -> dict[str, int]:
    """Count tokens over all choices."""
    prompt = max(delta.prompt_tokens for delta in choices.values())
    made = sum(delta.completion_tokens for delta in choices.values())
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _score(one: TokenScore) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.bytes)}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"

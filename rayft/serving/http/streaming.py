"""Answers of the two completion endpoints, whole or as a stream of server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from rayft.serving.http.errors import describe_error
from rayft.serving.http.responses import Usage
from rayft.serving.messages import Delta, TokenScore, joined

__all__ = ["ChatForm", "Form", "TextForm", "collected", "events", "usage"]


class Form(ABC):
    """Writes answers; its subclasses have what differs between chat completions and plain completions."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str) -> None:
        self.fingerprint = ""
        """Content hash of the adapter that generates the answer; empty for the base."""
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    @abstractmethod
    def opening(self) -> dict[str, Any] | None:
        """Return the part that opens each choice of a stream; None if nothing opens it."""

    @abstractmethod
    def piece(self, delta: Delta) -> dict[str, Any]:
        """Return the part of a choice with the new text of a stream."""

    @abstractmethod
    def full(self, delta: Delta) -> dict[str, Any]:
        """Return the part of a choice with the whole text."""

    @abstractmethod
    def scores(self, scores: Sequence[TokenScore], offsets: Sequence[int]) -> dict[str, Any]:
        """Return the log-probabilities of tokens, given where in the text each of them begins."""

    def chunk(self, choice: dict[str, Any] | None, **extra: Any) -> dict[str, Any]:
        """Return the content of one event of a stream."""
        return {**self._head(self.chunk_object), "choices": [] if choice is None else [choice], **extra}

    def choice(self, part: dict[str, Any], delta: Delta) -> dict[str, Any]:
        """Return a choice, or a part of one."""
        scores = self.scores(delta.scores, delta.offsets) if delta.scores else None
        return {"index": delta.index, **part, "logprobs": scores, "finish_reason": delta.finish}

    def whole(self, choices: Mapping[int, Delta]) -> dict[str, Any]:
        """Return a whole answer, given the complete text, scores and finish reason of each choice."""
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
        """Return the role of the message."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, delta: Delta) -> dict[str, Any]:
        """Return the new text as a `delta`."""
        parts = {"reasoning_content": delta.reasoning, "content": delta.text}
        return {"delta": {name: text for name, text in parts.items() if text}}

    def full(self, delta: Delta) -> dict[str, Any]:
        """Return the text as a `message`; `reasoning_content` is null if the model did not reason."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"message": {**message, "reasoning_content": delta.reasoning or None}}

    def scores(self, scores: Sequence[TokenScore], offsets: Sequence[int]) -> dict[str, Any]:
        """Return one entry for each token."""
        found = [{**_score(one), "top_logprobs": [_score(top) for top in one.top]} for one in scores]
        return {"content": found, "refusal": None}


class TextForm(Form):
    """Answers of `/v1/completions`."""

    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def opening(self) -> dict[str, Any] | None:
        """Return None: a plain text has no role."""
        return None

    def piece(self, delta: Delta) -> dict[str, Any]:
        """Return the text."""
        return {"text": delta.text}

    def full(self, delta: Delta) -> dict[str, Any]:
        """Return the text."""
        return {"text": delta.text}

    def scores(self, scores: Sequence[TokenScore], offsets: Sequence[int]) -> dict[str, Any]:
        """Return one list for each field."""
        return {
            "tokens": [one.text for one in scores],
            "token_logprobs": [one.logprob for one in scores],
            "top_logprobs": [_most_likely(one) for one in scores],
            "text_offset": list(offsets),
        }


async def collected(deltas: AsyncIterator[Delta]) -> dict[int, Delta]:
    """Join the deltas of each choice.

    Args:
        deltas: those that follow the one that accepts the request.

    Returns:
        Index of a choice → its last delta, with the choice's whole text, reasoning and scores.
    """
    parts: dict[int, list[Delta]] = {}
    async for delta in deltas:
        parts.setdefault(delta.index, []).append(delta)
    return {index: joined(each) for index, each in parts.items()}


async def events(form: Form, first: Delta, deltas: AsyncIterator[Delta], counts: bool) -> AsyncIterator[str]:
    """Yield server-sent events; an error that occurs meanwhile becomes the last event.

    Args:
        form: writes the events' content.
        first: the delta that accepts the request, which has no text.
        deltas: those that follow.
        counts: whether to end with the number of tokens.
    """
    opening, lasts = form.opening(), {0: first}
    begun: set[int] = set()
    try:
        async for delta in deltas:
            if opening is not None and delta.index not in begun:
                begun.add(delta.index)
                yield _event(form.chunk(form.choice(opening, Delta("", 0, 0, index=delta.index))))
            lasts[delta.index] = delta
            yield _event(form.chunk(form.choice(form.piece(delta), delta)))
    except Exception as error:  # noqa: BLE001  (the headers are sent, so it can't become a status)
        yield _event(describe_error(error)[1])
        return
    if counts:
        yield _event(form.chunk(None, usage=usage(lasts)))
    yield "data: [DONE]\n\n"


def usage(choices: Mapping[int, Delta]) -> Usage:
    """Return the number of tokens over all choices."""
    prompt = max(delta.prompt_tokens for delta in choices.values())
    made = sum(delta.completion_tokens for delta in choices.values())
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _score(one: TokenScore) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.bytes)}


def _most_likely(one: TokenScore) -> dict[str, float] | None:
    """Return the log-probabilities of the most likely tokens and of the token itself."""
    if one.logprob is None:
        return None
    found: dict[str, float] = {}
    for entry in (*one.top, one):
        # Tokens that are parts of characters may have the same text; the most likely one of them stays.
        if entry.logprob is not None:
            found.setdefault(entry.text, entry.logprob)
    return found


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"

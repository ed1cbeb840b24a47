"""The example: one type for all sources and formats. It is a conversation, a text or an image."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayft.errors import DataError

__all__ = ["REASONING", "Example", "Image", "Message", "digest", "named", "quoted", "shown"]


REASONING = ("reasoning_content", "reasoning", "thinking")
"""The keys under which data and chat templates have the reasoning of an answer."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str
    learn: bool = True
    """Whether the loss includes this turn. Only turns of the assistant are ever learnt."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Other keys that chat templates read, such as `tool_calls` or `reasoning_content`."""

    def turn(self) -> dict[str, Any]:
        """Return the turn as a mapping, which is what chat templates read."""
        return {"role": self.role, "content": self.content, **self.extras}


@dataclass(frozen=True)
class Image:
    """An encoded image (PNG, JPEG, …): the path of its file, or its bytes if it has no file of its own."""

    name: str
    """Path of its file, or its name in messages if it has none."""
    digest: str
    """Hash of its bytes (16 hex digits)."""
    data: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, data: bytes | None = None) -> Image:
        """Create the description of an image. The bytes of a file are read for the hash, and not kept.

        Args:
            name: path of the file, or a name for messages.
            data: the bytes of an image that has no file of its own.

        Raises:
            OSError: if the file can't be read.
        """
        content = Path(name).read_bytes() if data is None else data
        return cls(name, hashlib.sha256(content).hexdigest()[:16], data)

    def read(self) -> bytes:
        """Return the encoded bytes.

        Raises:
            OSError: if the file can't be read.
            DataError: if the file has changed since the data was read.
        """
        if self.data is not None:
            return self.data
        content = Path(self.name).read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] != self.digest:
            raise DataError(
                f"{self.name} has changed since the data was read: leave it alone while rayft runs, and run "
                "the command again"
            )
        return content


@dataclass(frozen=True)
class Example:
    """One item to learn from or to score, of one of three kinds.

    `messages` holds a conversation that ends with the assistant's answer (a prompt and its completion are a
    conversation of two turns). Or `text` holds a text: without a label it is raw text to continue, with one
    it is to be classified. Or `image` holds an image to classify.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    label: int | None = None
    """Index into `Parts.labels`."""
    label_name: str = ""
    separator: str = "\n"
    """Text between two turns, for tokenizers without a chat template."""
    entry: Mapping[str, Any] | None = None
    """The item of reasoning-gym, which its scorer needs."""
    image: Image | None = None
    """The image to classify; None for conversations and texts."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions (JSON schemas) of the tools that the assistant may call in this conversation."""

    @property
    def is_raw(self) -> bool:
        """Whether it is raw text, which has no answer."""
        return not self.messages and self.label is None

    @property
    def answer(self) -> str:
        """The expected answer: the last turn, or the name of the label; empty for raw text."""
        return self.messages[-1].content if self.messages else self.label_name

    @property
    def question(self) -> str:
        """What the model is asked: all turns but the last, or the text, or the name of the image."""
        if self.image is not None:
            return self.image.name
        if not self.messages:
            return self.text
        return "\n".join(f"{message.role}: {message.content}" for message in self.messages[:-1])

    @property
    def key(self) -> str:
        """The identity of the question: examples with equal keys ask the same, and must be in one part.

        The key covers every turn before the last answer with its role, or the text, or the bytes of the
        image. Text is only normalised to NFC, which makes canonically equivalent texts equal, such as an é of
        one and of two code points. Case, width, spacing and indentation count, since the meaning of a
        question can depend on them.
        """
        return self.asked[-1]

    @property
    def asked(self) -> tuple[str, ...]:
        """Keys of the questions whose answers are learnt. The last one is of the question that is scored."""
        if self.image is not None:
            return (self.image.digest,)
        hashed = hashlib.sha256()
        if not self.messages:
            _add(hashed, self.text)
            return (hashed.hexdigest()[:32],)
        if self.tools:
            _add(hashed, json.dumps(list(map(dict, self.tools)), sort_keys=True, default=str))
        found = []
        for number, message in enumerate(self.messages, start=1):
            learnt = message.role == "assistant" and message.learn
            if learnt or number == len(self.messages):
                found.append(hashed.hexdigest()[:32])
            _add(hashed, message.role)
            _add(hashed, message.content)
            if message.extras:
                _add(hashed, json.dumps(dict(message.extras), sort_keys=True, default=str))
        return tuple(found)

    @property
    def identity(self) -> str:
        """Question and answer as one text: examples of equal identity are repeats.

        The text covers everything that training and scoring read of an example, without normalisation. It
        leaves out `entry`, which reasoning-gym generates from the same configuration as question and answer.
        A field that was added to `digest` later is included only if it differs from its default, so that the
        digest of other data stays the same.
        """
        fields = [text for message in self.messages for text in (message.role, message.content)]
        fields += [self.text, self.label_name]
        if self.image is not None:
            fields.append(self.image.digest)
        fields = [_escaped(field) for field in fields]
        # In an escaped field, \x1c is always followed by c, d, e or f.
        if self.separator != "\n":
            fields.append("\x1cseparator=" + _escaped(self.separator))
        fields += [
            f"\x1cmessage {number}=" + json.dumps([message.learn, dict(message.extras)], default=str)
            for number, message in enumerate(self.messages)
            if message.extras or not message.learn
        ]
        if self.tools:
            fields.append("\x1ctools=" + json.dumps(list(map(dict, self.tools)), default=str))
        return "\x1f".join(fields)

    def to_json(self) -> str:
        """Return the example as JSON; images and items of reasoning-gym have no such form.

        Raises:
            DataError: if a message has a value that JSON has no form for.
        """
        assert self.image is None, "an image is not text"
        assert self.entry is None, "an item may have values of any type"
        messages = [[one.role, one.content, one.learn, dict(one.extras)] for one in self.messages]
        tools = list(map(dict, self.tools))
        try:
            return json.dumps([messages, self.text, self.label, self.label_name, self.separator, tools])
        except TypeError as error:
            raise DataError(
                f"{quoted(self.question)}: {error}; write such values of messages and tools as text"
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Example:
        """Return the example that `to_json` wrote."""
        messages, content, label, label_name, separator, tools = json.loads(text)
        return cls(
            messages=tuple(Message(*message) for message in messages),
            text=content,
            label=label,
            label_name=label_name,
            separator=separator,
            tools=tuple(tools),
        )


_MARKS = re.compile("[\x1c-\x1f]")
"""The control characters with which `digest` separates parts, examples and fields."""


def _escaped(text: str) -> str:
    """Replace each mark in a text by the first mark and a letter, so that it does not separate anything."""
    return _MARKS.sub(lambda mark: "\x1c" + "cdef"[ord(mark[0]) - 0x1C], text)


def _add(hashed: hashlib._Hash, text: str) -> None:
    """Add the length of a text and the text to a hash, so that the boundaries of texts count."""
    content = unicodedata.normalize("NFC", text).encode()
    hashed.update(b"%d:" % len(content) + content)


def quoted(text: str) -> str:
    """Quote the start of a text for a message: 60 characters at most, with escaped control characters."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def shown(example: Example) -> str:
    """Quote the start of a question for a message, as `quoted` does."""
    return quoted(example.messages[-2].content if len(example.messages) > 1 else example.question)


def named(part: str, index: int, example: Example) -> str:
    """Return how messages name an example. Its number in the part is not that of its row in a file."""
    return f"{part} example {index + 1} ({shown(example)})"


def digest(parts: Iterable[Iterable[Example]]) -> str:
    """Return a hash (16 hex digits) of the identities of all examples of all parts, in their order."""
    total = hashlib.sha256()
    for part in parts:
        total.update(b"\x1dpart")
        for example in part:
            total.update(b"\x1e" + example.identity.encode())
    return total.hexdigest()[:16]

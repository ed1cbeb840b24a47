"""One representation for every source and format: a conversation, a text with an optional class, an image."""

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

__all__ = ["REASONING", "Example", "Image", "Message", "digest", "quoted"]


REASONING = ("reasoning_content", "reasoning", "thinking")
"""What data and chat templates call the reasoning of an answer."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str
    learn: bool = True
    """Whether the loss is taken on it; only an assistant's turn is ever learnt."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What a chat template reads beside role and content, such as `tool_calls` or `reasoning_content`."""

    def turn(self) -> dict[str, Any]:
        """Return the turn as chat templates want it."""
        return {"role": self.role, "content": self.content, **self.extras}


@dataclass(frozen=True)
class Image:
    """An encoded image (PNG, JPEG, …): the path of its file, or its bytes where it has none of its own."""

    name: str
    """Its file, or what messages call it."""
    digest: str
    """Hash (16 hex digits) of its bytes."""
    data: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, data: bytes | None = None) -> Image:
        """Describe a file, whose bytes are read for the hash and not kept, or bytes, which are.

        Raises:
            OSError: if the file can't be read.
        """
        content = Path(name).read_bytes() if data is None else data
        return cls(name, hashlib.sha256(content).hexdigest()[:16], data)

    def read(self) -> bytes:
        """Give its bytes.

        Raises:
            OSError: if its file can't be read.
            DataError: if its file has changed since it was described.
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
    """One item to learn from or to score.

    Either `messages` holds a conversation that ends with the assistant's answer (a prompt and its
    completion are a conversation of two turns), or `text` holds raw text: to continue where `label`
    is None, else to classify; or `image` holds an image to classify.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    label: int | None = None
    """Index into `Parts.labels`."""
    label_name: str = ""
    separator: str = "\n"
    """What stands between two turns where a tokenizer has no chat template."""
    entry: Mapping[str, Any] | None = None
    """reasoning-gym's item, which its scorer wants back."""
    image: Image | None = None
    """What is classified, where that is no text."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions (JSON schemas) of the tools that the assistant may call in this conversation."""

    @property
    def answer(self) -> str:
        """What a model should say: the last turn, or the label's name; empty for raw text."""
        return self.messages[-1].content if self.messages else self.label_name

    @property
    def question(self) -> str:
        """What a model is asked: all turns but the last, or the text, or an image's name."""
        if self.image is not None:
            return self.image.name
        if not self.messages:
            return self.text
        return "\n".join(f"{message.role}: {message.content}" for message in self.messages[:-1])

    @property
    def key(self) -> str:
        """Identify the question: examples with equal keys ask the same and must be in one part.

        The key covers every turn before the last answer with its role, or the text, or the image's bytes.
        Text is normalised to NFC and in no other way: that makes nothing equal but canonically equivalent
        text, such as an é of one and of two code points. Case, width, spacing and indentation count, since a
        question's meaning can lie in them.
        """
        return self.asked[-1]

    @property
    def asked(self) -> tuple[str, ...]:
        """Return the keys of the questions whose answers are learnt, and last the one that is scored."""
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
        """Return question and answer as one text: examples of equal identity are repeats.

        It covers all that training and scoring read of an example, to the letter, but for `entry`, which
        reasoning-gym makes from the same configuration as question and answer. A field that `digest` did
        not always cover is added only where it differs from its default, so that the digest of other data
        stays what it was.
        """
        fields = [text for message in self.messages for text in (message.role, message.content)]
        fields += [self.text, self.label_name]
        if self.image is not None:
            fields.append(self.image.digest)
        fields = [_escaped(field) for field in fields]
        # An escaped field never holds \x1c before anything but c, d, e or f.
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


_MARKS = re.compile("[\x1c-\x1f]")
"""Control characters by which `digest` separates parts, examples and fields."""


def _escaped(text: str) -> str:
    """Replace each mark in the data by the first of them and a letter, so that it separates nothing."""
    return _MARKS.sub(lambda mark: "\x1c" + "cdef"[ord(mark[0]) - 0x1C], text)


def _add(hashed: hashlib._Hash, text: str) -> None:
    """Add a text to a hash, after its length, so that texts one after the other can't be confused."""
    content = unicodedata.normalize("NFC", text).encode()
    hashed.update(b"%d:" % len(content) + content)


def quoted(text: str) -> str:
    """Quote the start of a text for a message: on one line, without control characters, 60 at most."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def digest(parts: Iterable[Iterable[Example]]) -> str:
    """Hash (16 hex digits) the identities of the examples of all parts, in their order."""
    total = hashlib.sha256()
    for part in parts:
        total.update(b"\x1dpart")
        for example in part:
            total.update(b"\x1e" + example.identity.encode())
    return total.hexdigest()[:16]

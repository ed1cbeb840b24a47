"""One representation for every source and format: a conversation, a text with an optional class, an image."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["REASONING", "Example", "Image", "Message", "digest"]


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
        """
        return Path(self.name).read_bytes() if self.data is None else self.data


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
        """The question without differences of case, width and spacing: equal keys are duplicates.

        Images are duplicates if their files hold the same bytes.
        """
        if self.image is not None:
            return self.image.digest
        return " ".join(unicodedata.normalize("NFKC", self.question).casefold().split())


def digest(parts: Iterable[Iterable[Example]]) -> str:
    """Hash (16 hex digits) what the examples of all parts say, in their order."""
    total = hashlib.sha256()
    for part in parts:
        total.update(b"\x1dpart")
        for example in part:
            turns = [text for message in example.messages for text in (message.role, message.content)]
            fields = [*turns, example.text, example.label_name]
            if example.image is not None:
                fields.append(example.image.digest)
            # Only where they are there: ordinary data keeps the digest that it had without them.
            fields += [
                json.dumps([number, message.learn, dict(message.extras)], sort_keys=True, default=str)
                for number, message in enumerate(example.messages)
                if message.extras or not message.learn
            ]
            if example.tools:
                fields.append(json.dumps(list(map(dict, example.tools)), sort_keys=True, default=str))
            total.update(b"\x1e" + "\x1f".join(fields).encode("utf-8", "surrogatepass"))
    return total.hexdigest()[:16]

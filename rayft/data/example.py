"""One representation for every source and format: a conversation, or a text with an optional class."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Example", "Message", "digest"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One item to learn from or to score.

    Either `messages` holds a conversation that ends with the assistant's answer (a prompt and its
    completion are a conversation of two turns), or `text` holds raw text: to continue where `label`
    is None, else to classify.
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

    @property
    def answer(self) -> str:
        """What a model should say: the last turn, or the label's name; empty for raw text."""
        return self.messages[-1].content if self.messages else self.label_name

    @property
    def question(self) -> str:
        """What a model is asked: all turns but the last, or the text."""
        if not self.messages:
            return self.text
        return "\n".join(f"{message.role}: {message.content}" for message in self.messages[:-1])

    @property
    def key(self) -> str:
        """The question without differences of case, width and spacing: equal keys are duplicates."""
        return " ".join(unicodedata.normalize("NFKC", self.question).casefold().split())


def digest(parts: Iterable[Iterable[Example]]) -> str:
    """Hash (16 hex digits) what the examples of all parts say, in their order."""
    total = hashlib.sha256()
    for part in parts:
        total.update(b"\x1dpart")
        for example in part:
            turns = [text for message in example.messages for text in (message.role, message.content)]
            fields = [*turns, example.text, example.label_name]
            total.update(b"\x1e" + "\x1f".join(fields).encode("utf-8", "surrogatepass"))
    return total.hexdigest()[:16]

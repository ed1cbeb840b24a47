"""A model to talk to, without weights."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from rayft.data.chat_format import Answer
from rayft.errors import ResourceError
from rayft.flow.chat.models import Options

__all__ = ["Echo"]


@dataclass
class Echo:
    """A model that repeats the last question in two parts, and remembers what it was asked."""

    name: str = "echo"
    asked: list[list[tuple[str, str]]] = field(default_factory=list)

    async def answer(
        self, messages: Sequence[dict[str, str]], options: Options
    ) -> AsyncGenerator[Answer, None]:
        self.asked.append([(one["role"], one["content"]) for one in messages])
        question = messages[-1]["content"]
        if question == "fail":
            raise ResourceError("it is too late")
        yield Answer("so ", "")
        if question == "wait":
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        if question == "sleep":
            await asyncio.sleep(600)
        if question == "think":
            yield Answer("", "hm")
        yield Answer(f"{question}[/red]", "")

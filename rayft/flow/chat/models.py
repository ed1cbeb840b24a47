"""What `rayft chat` talks to: models on a running server, or a base and adapters in this process."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import httpx

from rayft.artifacts import AdapterArtifact
from rayft.artifacts.meta import CONFIG_FILE
from rayft.data.chat_format import Answer, AnswerParser, ChatFormat
from rayft.errors import ArtifactError, BadRequestError, ConfigError, ResourceError, SqueezeError
from rayft.flow.adapters import checked, key_headers, reason
from rayft.flow.origin import find_folder
from rayft.models.load import ModelConfig
from rayft.serving.config import ServeConfig
from rayft.serving.control.admission import check_adapter
from rayft.serving.engine.api import GenerationRequest
from rayft.serving.engine.start import Started, start_engine
from rayft.serving.messages import BASE_NAME
from rayft.serving.text import TextStream, chat_tokens
from rayft.squeeze.rank import squeeze

__all__ = ["ChatModel", "Options", "open_local", "open_served"]

Message = dict[str, str]
SECONDS_TO_ANSWER = 10.0
"""How long a server may take to list its models."""
SECONDS_BETWEEN = 120.0
"""How long a server may take between two parts of an answer."""


@dataclass(frozen=True)
class Options:
    """How answers are generated."""

    temperature: float
    """Temperature; 0 always takes the most likely token."""
    max_tokens: int
    """Largest number of tokens of an answer."""


class ChatModel(Protocol):
    """A model that answers."""

    @property
    def name(self) -> str:
        """The name that is shown."""

    def answer(self, messages: Sequence[Message], options: Options) -> AsyncGenerator[Answer, None]:
        """Answer a conversation that ends with a question, and yield the parts of the answer as they come.

        Raises:
            RayftError: if it can't be answered, with the reason.
        """


@dataclass(frozen=True)
class ServedModel:
    """A model on a server with an OpenAI-compatible API."""

    name: str
    url: str

    async def answer(self, messages: Sequence[Message], options: Options) -> AsyncGenerator[Answer, None]:
        """See `ChatModel.answer`."""
        body = {
            "model": self.name,
            "messages": list(messages),
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "stream": True,
        }
        try:
            async with (
                httpx.AsyncClient(
                    base_url=self.url, headers=key_headers(), timeout=SECONDS_BETWEEN
                ) as client,
                client.stream("POST", "/v1/chat/completions", json=body) as reply,
            ):
                if not reply.is_success:
                    await reply.aread()
                    raise ResourceError(f"the server refuses ({reply.status_code}): {reason(reply)}")
                async for line in reply.aiter_lines():
                    text = line.removeprefix("data: ")
                    if text not in (line, "[DONE]"):
                        yield _part(json.loads(text))
        except httpx.HTTPError as error:
            raise ResourceError(
                f"{self.url} has ended the answer ({type(error).__name__}: {error})"
            ) from error


def _part(event: dict[str, Any]) -> Answer:
    """Return the text in an event of a stream.

    Raises:
        ResourceError: if the event is an error.
    """
    if "error" in event:
        raise ResourceError(
            f"the server has ended the answer: {event['error'].get('message', event['error'])}"
        )
    delta = event["choices"][0]["delta"] if event.get("choices") else {}
    return Answer(delta.get("content") or "", delta.get("reasoning_content") or "")


def open_served(url: str, names: Sequence[str]) -> list[ChatModel]:
    """Return models of a running server.

    Args:
        url: the server's.
        names: values of the `model` field.

    Raises:
        ResourceError: if the server can't be reached, or refuses this caller.
    """
    try:
        url.encode()
        client = httpx.Client(base_url=url.rstrip("/"), headers=key_headers())
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ResourceError(f"--url {url} is not a URL ({error}); write http://host:port") from error
    with client:
        checked(client, "GET", "/v1/models", option="--url", timeout=SECONDS_TO_ANSWER)
    return [ServedModel(name, url.rstrip("/")) for name in names]


@dataclass(frozen=True)
class LocalModel:
    """A base, or an adapter on it, in this process."""

    name: str
    started: Started
    adapter: str | None = None
    """Name of the adapter in the engine; None for the base."""

    async def answer(self, messages: Sequence[Message], options: Options) -> AsyncGenerator[Answer, None]:
        """See `ChatModel.answer`."""
        tokenizer, context = self.started.tokenizer, self.started.context
        prompt = chat_tokens(tokenizer, messages)
        room = context - len(prompt)
        if room < 1:
            raise BadRequestError(
                f"the conversation has {len(prompt)} tokens, and the model's context is {context}; begin "
                "again with /reset"
            )
        request = GenerationRequest(
            prompt,
            min(options.max_tokens, room),
            adapter=self.adapter,
            temperature=options.temperature,
        )
        chat_format = ChatFormat.of(tokenizer)
        parser = AnswerParser(chat_format, in_block=chat_format.in_block(prompt))
        text = TextStream(chat_format.decode, chat_format.stops, parser)
        async with aclosing(self.started.engine.submit(request)) as steps:
            async for step in steps:
                yield text.push(step.tokens, last=step.finish is not None)
                if text.stopped:
                    return


@contextmanager
def open_local(names: Sequence[str], base: str | None = None) -> Iterator[list[ChatModel]]:
    """Load models into this process for the length of a block; rayft's own engine runs them on the CPU.

    Models on the same base share it.

    Args:
        names: a base (a registered name, a folder, a .gguf file, a hub id), `base` for the base of another
            one, or the folder of an adapter or of a sweep or run; a rank may follow (`runs/mine@r8`).
        base: the base of adapters that don't name one, or in place of the one that they name.

    Raises:
        RayftError: naming what can't be loaded, and why.
    """
    asked = [_asked(name, base) for name in names]
    known = next((one.base for one in asked if one.base), None)
    if known is None:
        raise ConfigError(
            f"'{BASE_NAME}' is the base of the other model; name that one, or a base such as "
            f"{ModelConfig().name}"
        )
    engines: dict[str, Started] = {}
    try:
        yield [_opened(one, one.base or known, engines) for one in asked]
    finally:
        for started in engines.values():
            started.engine.stop()


def _opened(one: _Asked, base: str, engines: dict[str, Started]) -> LocalModel:
    """Load a model into the engine of its base, which is started if it is not among `engines`."""
    if base not in engines:
        engines[base] = start_engine(ServeConfig(model=ModelConfig(name=base)), "cpu")
    started = engines[base]
    if one.folder is None:
        return LocalModel(one.name, started)
    artifact = check_adapter(one.name, str(one.folder), started.base)
    if one.rank is not None:
        # Only sorted columns have prefixes.
        artifact = squeeze(artifact, rank=one.rank)
    adapter = uuid4().hex
    asyncio.run(started.engine.load(adapter, artifact))
    return LocalModel(one.name, started, adapter)


@dataclass(frozen=True)
class _Asked:
    """What a name stands for."""

    name: str
    base: str
    """Name of the base; empty for that of another model."""
    folder: Path | None = None
    """Folder of the adapter; None for the base alone."""
    rank: int | None = None


def _asked(name: str, base: str | None) -> _Asked:
    """Return what a name stands for.

    Raises:
        ArtifactError, ConfigError, SqueezeError: if it can stand for nothing.
    """
    place, _, rank = name.rpartition("@r") if re.search(r"@r\d+$", name) else (name, "", "")
    folder = find_folder(Path(place).expanduser())
    if (folder / CONFIG_FILE).is_file():
        artifact = AdapterArtifact.load(folder)
        if rank and not 1 <= int(rank) <= artifact.rank:
            raise SqueezeError(f"{place} has rank {artifact.rank}; ask for 1 to {artifact.rank}, not {rank}")
        named = base or artifact.meta.base_model
        if not named:
            raise ArtifactError(f"{folder} does not say which base it is for; name the base with --base")
        return _Asked(name, named, folder, int(rank) if rank else None)
    if rank:
        raise ConfigError(f"{place} is no adapter's folder, and only adapters have a rank (@r{rank})")
    return _Asked(name, base or "" if name == BASE_NAME else name)

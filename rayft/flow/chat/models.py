"""What `rayft chat` talks to: models on a running server, or a base and adapters in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol
from uuid import uuid4

import httpx

from rayft.artifacts import AdapterArtifact
from rayft.data.chat_format import Answer, AnswerParser, ChatFormat
from rayft.errors import (
    ArtifactError,
    BadRequestError,
    BaseMismatchError,
    ConfigError,
    ModelError,
    ResourceError,
)
from rayft.flow.http import api_url, key_headers, reason, served_card, served_cards
from rayft.flow.target import Target, base_among, find_targets, remedy
from rayft.models.base import base_of, pinned
from rayft.models.load import ModelConfig, load_encoder
from rayft.paths import checked_text
from rayft.peft.folder import PeftFolder
from rayft.serving.config import ServeConfig
from rayft.serving.control.admission import check_artifact
from rayft.serving.engine.api import GenerationRequest
from rayft.serving.engine.start import Started, describe, start_engine
from rayft.serving.messages import BASE_NAME
from rayft.serving.text import TextStream, chat_tokens
from rayft.tracking.base import TrackingConfig, tracker_spec

__all__ = ["ChatModel", "Message", "Options", "open_local", "open_models", "open_served"]

Message = dict[str, str]
SECONDS_BETWEEN = 120.0
"""How long a server may take between two parts of an answer."""


@dataclass(frozen=True)
class Options:
    """How answers are generated.

    Raises:
        ConfigError: if one of them is out of its range.
    """

    temperature: float = 0.7
    """Temperature, from 0 to 2; 0 always takes the most likely token."""
    max_tokens: int = 512
    """Largest number of tokens of an answer."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"temperature {self.temperature}: write a number from 0 to 2")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens {self.max_tokens}: write 1 or more")


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
    """The server's, up to `/v1`."""

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
                client.stream("POST", "/chat/completions", json=body) as reply,
            ):
                if not reply.is_success:
                    await reply.aread()
                    raise ResourceError(f"the server refuses ({reply.status_code}): {reason(reply)}")
                if "event-stream" not in reply.headers.get("content-type", ""):
                    raise ResourceError(
                        f"{self.url} does not stream its answers; is it an OpenAI-compatible API?"
                    )
                ended = False
                async for line in reply.aiter_lines():
                    text = line.removeprefix("data:").strip()
                    ended = ended or text == "[DONE]"
                    if line.startswith("data:") and text != "[DONE]":
                        yield _part(text)
                if not ended:
                    # Without a length, a connection that is lost looks like one that has ended.
                    raise ResourceError(f"{self.url} has ended the answer in its middle; does it still run?")
        except httpx.HTTPError as error:
            raise ResourceError(
                f"{self.url} has ended the answer ({type(error).__name__}: {error})"
            ) from error


def _part(text: str) -> Answer:
    """Return the text in an event of a stream.

    Raises:
        ResourceError: if the event is an error, or no event of such a stream.
    """
    try:
        event = json.loads(text)
        if "error" in event:
            raise ResourceError(
                f"the server has ended the answer: {event['error'].get('message', event['error'])}"
            )
        delta = event["choices"][0]["delta"] if event.get("choices") else {}
        return Answer(delta.get("content") or "", delta.get("reasoning_content") or "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResourceError(f"the server sends what is no part of an answer: {text[:200]}") from error


def open_served(url: str, names: Sequence[str]) -> list[ChatModel]:
    """Return models of a running server.

    Args:
        url: the server's.
        names: values of the `model` field.

    Raises:
        ResourceError: if the server can't be reached, or refuses this caller.
        ModelError: if it does not serve one of the names.
    """
    url = api_url(url)
    cards = served_cards(url)
    for name in names:
        served_card(url, cards, name)
    return [ServedModel(name, url) for name in names]


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
                "again (/reset)"
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
def open_models(
    names: Sequence[str], *, url: str | None = None, base: str | None = None, uri: str | None = None
) -> Iterator[list[ChatModel]]:
    """Find models to talk to, on a running server or in this process, for the length of a block.

    Args:
        names: one, or two to compare: as `open_local`, or with `url` as `open_served`.
        url: a running server; None to load the models into this process.
        base: the base of adapters that name none, or instead of the one that they name.
        uri: MLflow, for `models:/…`.

    Raises:
        RayftError: naming what can't be talked to, and why; also for an option that would do nothing.
    """
    for name in names:
        checked_text(name, "the model")
    for option, value in (("--base", base), ("--uri", uri)):
        if value is not None:
            checked_text(value, option)
    if url is not None:
        for option, value in (("--base", base), ("--uri", uri)):
            if value is not None:
                raise ConfigError(
                    f"{option} is for models in this process, and a server has its own: leave it out"
                )
        yield open_served(url, names)
        return
    registry = ""
    if any(name.startswith("models:/") for name in names):
        registry = tracker_spec(TrackingConfig(uri=uri), Path.cwd()).uri
    elif uri is not None:
        raise ConfigError(f"--uri is for models:/…, and {names[0]} is none: leave it out")
    with open_local(names, base, registry) as models:
        yield models


@contextmanager
def open_local(
    names: Sequence[str], base: str | None = None, registry: str = ""
) -> Iterator[list[ChatModel]]:
    """Load models into this process for the length of a block; rayft's own engine runs them on the CPU.

    Models on the same base share it. Everything but what only shows in the weights is checked before weights
    are loaded.

    Args:
        names: as `rayft.flow.target.find_target`.
        base: the base of adapters that don't name one, or in place of the one that they name.
        registry: URI of MLflow, for `models:/…`.

    Raises:
        RayftError: naming what can't be loaded, and why.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        targets = find_targets(names, None, registry, scratch)
        bases = _bases(targets, base)
        for config in dict.fromkeys(bases):
            _check(config, [target for target, own in zip(targets, bases, strict=True) if own == config])
        engines: dict[ModelConfig, Started] = {}
        models: list[ChatModel] = []
        for target, config in zip(targets, bases, strict=True):
            if config not in engines:
                engines[config] = start_engine(ServeConfig(model=config), "cpu")
                stack.callback(engines[config].engine.stop)
            models.append(_opened(target, engines[config]))
        yield models


def _bases(targets: Sequence[Target], base: str | None) -> list[ModelConfig]:
    """Return the base of each target, or the model that it is."""
    if base is not None and not any(target.needs_base for target in targets):
        raise ConfigError(
            f"--base is for adapters, and {targets[0].name} is a model of its own: leave it out"
        )
    found = []
    for target in targets:
        if target.adapter is not None:
            config = base_of(target.adapter, base)
            if config is None:
                raise ArtifactError(f"{target.name} does not say which base it is for; name it with --base")
        else:
            config = _model(target, targets, base)
        # Whatever an adapter is for, the engine generates text.
        found.append(config.model_copy(update={"task": "causal_lm"}))
    return found


def _model(target: Target, targets: Sequence[Target], base: str | None) -> ModelConfig:
    """Return the model that a target without an adapter is."""
    if target.model:
        return ModelConfig(name=target.model)
    adapter = next((other.adapter for other in targets if other.adapter), None)
    if base is not None:
        return pinned(ModelConfig(name=base), adapter)
    other = next((other.model for other in targets if other.model), "")
    if (named := base_among(targets)) is None and not other:
        raise ConfigError(
            f"'{BASE_NAME}' is the base of the other model; name that one, or a base such as "
            f"{ModelConfig().name}"
        )
    return named or ModelConfig(name=other)


def _check(model: ModelConfig, targets: Sequence[Target]) -> None:
    """Check without weights that a base can be talked to, and that the adapters among targets fit it."""
    config = ServeConfig(model=model)
    if not load_encoder(config.model).chat_template:
        raise ModelError(
            f"{model.name} has no chat template, so it can't be talked to; choose a model that was tuned for "
            "chat"
        )
    adapters = [(target.name, target.adapter) for target in targets if target.adapter is not None]
    described = describe(config, "cpu") if adapters else None
    for name, adapter in adapters:
        if isinstance(adapter, PeftFolder):
            raise ArtifactError(f"{name} is no LoRA, and the engine runs nothing else; {remedy(adapter)}")
        try:
            check_artifact(adapter, name, described)
        except BaseMismatchError as error:
            raise BaseMismatchError(f"{name} can't be used: {error}") from error


def _opened(target: Target, started: Started) -> LocalModel:
    """Load a model into the engine of its base."""
    if target.adapter is None:
        return LocalModel(target.name, started)
    assert isinstance(target.adapter, AdapterArtifact)
    adapter = uuid4().hex
    # In a notebook, this thread has a loop that is running.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, started.engine.load(adapter, target.adapter)).result()
    return LocalModel(target.name, started, adapter)

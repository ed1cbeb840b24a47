"""A replica: it has the base in memory, an engine and the catalog, and turns requests into text."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from socket import gethostname
from typing import Any

import ray.serve as ray_serve
import torch
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from rayft.data.chat_format import AnswerParser, ChatFormat
from rayft.errors import (
    BadRequestError,
    ContextLengthError,
    ModelError,
    RayftError,
    RequestTimeoutError,
    ResourceError,
)
from rayft.numerics import derive_seed
from rayft.serving.answers import Outbox
from rayft.serving.catalog import Catalog, Lease, Limits
from rayft.serving.config import ServeConfig
from rayft.serving.control.copies import TOUCH_SECONDS, Copies
from rayft.serving.control.state import Deployed, Served
from rayft.serving.control.transfer import receive
from rayft.serving.engine.api import STOPPED, GenerationRequest, Progress
from rayft.serving.engine.start import EngineName, Started, start_engine
from rayft.serving.http.calls import Asked
from rayft.serving.http.errors import LOST
from rayft.serving.http.schemas import ChatRequest, CompletionRequest
from rayft.serving.messages import Delta, ModelCard, joined
from rayft.serving.metrics import Meter, Metrics
from rayft.serving.presence import ending
from rayft.serving.text import (
    Places,
    TextStream,
    chat_tokens,
    check_tokens,
    prompt_scores,
    prompt_tokens,
    score,
)
from rayft.squeeze.budget import parse_bytes

__all__ = ["Replica", "ReplicaDeployment"]


logger = logging.getLogger("ray.serve")

LONG_CHARACTERS = 20_000
"""Number of characters from which a text is tokenized in another thread; it takes 20 ms with a byte
tokenizer."""

WATCH_SECONDS = 1.0
"""Interval at which a replica asks the director whether it missed a change."""

MERGED_SECONDS = 0.02
"""Longest time for which the tokens of an answer are collected before they are sent; the first is sent at
once."""

TURNS = 2
"""Number of choices of one request that are in the engine at once, in units of `max_running`. A request may
have thousands (`n` for each of several prompts), and the engine begins in the order in which it gets them."""

RETRY_SECONDS = 5.0
"""Interval at which a replica tries again to load the adapters that it could not load."""


class Replica:
    """Answers requests; Ray Serve creates and calls it."""

    def __init__(self, config: ServeConfig, engine: EngineName, server: str) -> None:
        """Load the base; `reconfigure` then gets the adapters from the director.

        Args:
            config: the server's configuration.
            engine: which engine generates.
            server: identifies the server, as in `Director`.

        Raises:
            ModelError: if the base can't be loaded on this node, which the message names.
            ResourceError: if the engine can't be started.
        """
        # Ray sets OMP_NUM_THREADS for its workers, but torch may have been imported with another value.
        torch.set_num_threads(config.cpus)
        started = _started(config, engine)
        self._config, self._tokenizer, self._engine = config, started.tokenizer, started.engine
        self._fingerprint, self._room = started.base.fingerprint, started.context
        self._format = ChatFormat.of(started.tokenizer)
        if self._format.problem:
            logger.warning("answers to chats may not end by themselves: %s", self._format.problem)
        self._metrics = Metrics()
        self._catalog = Catalog(
            started.base,
            started.engine,
            started.dtype,
            keeps=engine == "vllm",
            limits=Limits(started.device_bytes, _bytes(config.host_bytes)),
            on_event=self._metrics.on_event,
            fetch=self._fetch,
        )
        self._copies = Copies(config.fetched, server)
        self._copies.remove_stale()
        self._outbox = Outbox()
        self._director: Any = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._tokenizing = asyncio.Lock()

    async def reconfigure(self, _: Mapping[str, Any]) -> None:
        """Serve what the director decides, from now on; Ray Serve calls this when a replica starts.

        The first replicas of a server start only if they can load all adapters. Later ones serve what they
        can load.

        Raises:
            ArtifactError: if an adapter can't be served.
            ModelError: if the base is not the one that the server has served so far.
        """
        if self._tasks:
            return
        director: Any = ray_serve.get_deployment_handle("Director")
        self._director = director
        base = await director.base.remote()
        self._check_base(base or self._fingerprint)
        await self.catch_up(await director.state.remote(), all_or_none=not base)
        self._check_base(await director.started.remote(self._fingerprint))
        self._tasks.add(asyncio.create_task(self._watch(director)))
        # To look for reference cycles in all modules would stop all answers for some hundred milliseconds.
        gc.collect()
        gc.freeze()

    def _check_base(self, served: str) -> None:
        if served != self._fingerprint:
            raise ModelError(
                f"{self._config.model.name} now has another base ({self._fingerprint}) than the one that is "
                f"served ({served}); restore that one, or start the server again to serve the new one"
            )

    async def catch_up(self, served: Served, *, all_or_none: bool = False) -> None:
        """Prepare and serve a change on this replica alone (see `Catalog.catch_up`)."""
        await self._catalog.catch_up(served, all_or_none=all_or_none)
        self._update_metrics()

    async def prepare(self, served: Served) -> None:
        """Prepare a change (see `Catalog.prepare`)."""
        await self._catalog.prepare(served)

    async def commit(self, number: int) -> None:
        """Serve a prepared change."""
        await self._catalog.commit(number)
        self._update_metrics()

    def _update_metrics(self) -> None:
        """Adapt the metrics to what is served."""
        served = self._catalog.served
        # Keep the counts of versions that a rollback can serve again.
        self._metrics.keep({one.id for one in (*served.versions, *served.previous.values())})
        self._metrics.lack(self._catalog.problems())

    async def abandon(self, number: int) -> None:
        """Abandon a prepared change."""
        await self._catalog.abandon(number)

    async def drop(self, names: Sequence[str]) -> None:
        """Delete this node's copies of adapters that are no longer served."""
        await asyncio.to_thread(self._copies.drop, names)

    async def _fetch(self, deployed: Deployed) -> bool:
        """Copy an adapter to this node (see `receive`)."""
        if self._director is None:
            return False
        return await receive(deployed, self._copies, self._director)

    async def serving(self) -> Served:
        """Return what is served."""
        return self._catalog.served

    async def _watch(self, director: Any) -> None:
        """Ask every second whether a change was missed, such as one during the start of this replica."""
        tried = time.monotonic()
        touched = -TOUCH_SECONDS
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if time.monotonic() - touched >= TOUCH_SECONDS:
                self._copies.touch()
                touched = time.monotonic()
            try:
                if time.monotonic() - tried >= RETRY_SECONDS:
                    await self._catalog.retry()
                    tried = time.monotonic()
                self._metrics.lack(self._catalog.problems())
                if await director.number.remote() != self._catalog.served.number:
                    await self.catch_up(await director.state.remote())
            except (RayftError, RayError, RayServeException) as error:
                logger.warning("can't get what is to be served: %s", error)
            except Exception:
                # No error may end this loop.
                logger.exception("can't get what is to be served")

    def check_health(self) -> None:
        """Let Ray Serve replace the replica if its engine has stopped.

        Raises:
            ResourceError: if the engine has stopped.
        """
        if not self._engine.stats().alive:
            raise ResourceError(STOPPED)

    async def models(self) -> list[ModelCard]:
        """Describe what is served."""
        about: Any = {"base_fingerprint": self._fingerprint, "max_model_len": self._room}
        if self._config.model.revision is not None:
            about["base_revision"] = self._config.model.revision
        return [{**card, **about} for card in self._catalog.cards()]

    async def meant(self, model: str) -> tuple[str, int | None]:
        """See `Catalog.meant`."""
        return self._catalog.meant(model)

    async def problems(self) -> dict[str, str]:
        """Return why versions can't be served by this replica: id → reason.

        Raises:
            ResourceError: if the engine has stopped, so that nothing can be served.
        """
        self.check_health()
        return self._catalog.problems()

    async def stats(self) -> dict[str, Any]:
        """Return the counts of the engine, and the tier and the traffic of each version."""
        return {
            "pid": os.getpid(),
            "engine": asdict(self._engine.stats()),
            "tiers": self._catalog.tiers(),
            "problems": self._catalog.problems(),
            "traffic": self._metrics.traffic,
            "moves": self._metrics.moves,
        }

    async def record_routing_stats(self) -> dict[str, Any]:
        """Return the warm and the lacking `model`s for the routers; Ray Serve calls this regularly."""
        return {"warm": self._catalog.warm(), "lacking": self._catalog.lacking()}

    async def answer(self, asked: Sequence[Asked]) -> list[Exception | None]:
        """Answer requests, and send each answer in parts, or the error that it ends with, to the ingress.

        Args:
            asked: requests that came at the same time.

        Returns:
            For each request, why its answer could not be sent, or None if it was.
        """
        sent = [self._outbox.send(one.ticket, self.generate(one.request, one.draw)) for one in asked]
        ends = await asyncio.gather(*sent, return_exceptions=True)
        return [end if end is None or isinstance(end, Exception) else ResourceError(LOST) for end in ends]

    async def generate(
        self, request: ChatRequest | CompletionRequest, draw: float | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Answer a request, and yield the answer in parts.

        Args:
            request: the request.
            draw: number in [0, 1) that decides between the two versions of a canary; random by default.

        Raises:
            UnknownModelError: if its model is not served.
            BadRequestError: if it does not fit into the context, or exceeds a limit.
            RequestTimeoutError: if it takes too long.
        """
        started = time.monotonic()
        async with self._catalog.lease(request.model, draw) as lease:
            jobs = await self._jobs(request, lease)
            total = sum(len(job.prompt) for job in jobs) // request.choices
            # Before the request is accepted, so that one that the engine refuses is answered 400.
            steps = in_turns([self._engine.submit(job) for job in jobs], TURNS * self._config.max_running)
            yield Delta("", total, 0, fingerprint=lease.content_hash)
            meter = self._metrics.meter(lease.name, lease.version, total, started)
            failed = True
            try:
                choices = [
                    self._choice(job, each, request, index, total, meter)
                    for index, (job, each) in enumerate(zip(jobs, steps, strict=True))
                ]
                whole: dict[int, list[Delta]] = {}
                async with aclosing(bounded(merged(choices), self._config.max_seconds)) as deltas:
                    async for delta in deltas:
                        if request.stream:
                            yield delta
                        else:
                            whole.setdefault(delta.index, []).append(delta)
                for parts in whole.values():
                    yield joined(parts)
                failed = False
            except (asyncio.CancelledError, GeneratorExit):
                # The client has left, which is not an error of the adapter.
                failed = False
                raise
            finally:
                meter.end(failed=failed)

    async def _jobs(self, request: ChatRequest | CompletionRequest, lease: Lease) -> list[GenerationRequest]:
        """Return the engine's requests: one for each choice of each prompt."""
        # A stop string can only be found while the text grows.
        progress = request.stream or bool(self._stops(request))
        stop_tokens = frozenset(request.stop_token_ids or ())
        check_tokens(self._tokenizer, sorted(stop_tokens), "stop_token_ids")
        return [
            GenerationRequest(
                prompt=prompt,
                max_tokens=self._limit(request, len(prompt)),
                adapter=lease.adapter,
                rank=lease.rank,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                top_k=max(request.top_k or 0, 0),
                min_p=request.min_p or 0.0,
                repetition_penalty=request.repetition_penalty or 1.0,
                stop_tokens=stop_tokens,
                seed=seed,
                logprobs=request.scored,
                score_prompt=request.echoes and request.scored is not None,
                progress=progress,
                json_schema=request.json_schema,
            )
            for prompt in await self._prompts(request)
            for seed in _seeds(request.seed, request.choices)
        ]

    async def _choice(
        self,
        job: GenerationRequest,
        steps: AsyncGenerator[Progress, None],
        request: ChatRequest | CompletionRequest,
        index: int,
        prompt_tokens: int,
        meter: Meter,
    ) -> AsyncGenerator[Delta, None]:
        """Generate one choice."""
        text, reported, echo = self._text(request, job.prompt), 0, self._echo(request, job, index)
        places = Places()
        async with aclosing(steps):
            async for step in steps:
                new = text.push(step.tokens, last=step.finish is not None)
                finish = "stop" if text.stopped else step.finish
                if any(new) or finish:
                    # The tokens before the answer are omitted, as their text is.
                    fresh = step.logprobs[max(reported, text.skipped) : text.used] if text.answering else ()
                    scores = [score(self._tokenizer, entry) for entry in fresh]
                    reported = len(step.logprobs)
                    if echo is not None:
                        prompt = prompt_scores(self._tokenizer, job.prompt, step.prompt)
                        places, scores = Places(echo, prompt), [*prompt, *scores]
                    if request.echoes and step.end is not None and not text.stopped:
                        scores.append(score(self._tokenizer, step.end))
                    content, echo = (echo or "") + new.content, None
                    # After a stop string the engine may have generated more than was asked for.
                    made = text.used if text.stopped else step.generated
                    meter.progress(index, made, step.first_token_seconds)
                    yield Delta(
                        content,
                        prompt_tokens,
                        made,
                        finish,
                        index,
                        tuple(scores),
                        new.reasoning,
                        offsets=places.of(scores),
                    )
                if text.stopped:
                    return
                if step.finish is None:
                    # What the engine generates meanwhile comes as one step: each costs time on the way.
                    await until_beat(MERGED_SECONDS)

    def _echo(
        self, request: ChatRequest | CompletionRequest, job: GenerationRequest, index: int
    ) -> str | None:
        """Return the prompt of a choice as text; None if the answer does not begin with it."""
        if not isinstance(request, CompletionRequest) or not request.echo:
            return None
        prompt = request.prompts[index // request.choices]
        return prompt if isinstance(prompt, str) else str(self._tokenizer.decode(list(job.prompt)))

    def _text(self, request: ChatRequest | CompletionRequest, prompt: Sequence[int]) -> TextStream:
        """Return the stream that turns the tokens of a choice into text; a chat's separates the reasoning."""
        if not isinstance(request, ChatRequest):
            return TextStream(
                lambda tokens: str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)),
                self._stops(request),
                before=prompt,
            )
        parser = AnswerParser(self._format, in_block=self._format.in_block(prompt))
        return TextStream(self._format.decode, self._stops(request), parser)

    def _stops(self, request: ChatRequest | CompletionRequest) -> tuple[str, ...]:
        """Return the strings that end an answer."""
        return (*request.stops, *(self._format.stops if isinstance(request, ChatRequest) else ()))

    async def _prompts(self, request: ChatRequest | CompletionRequest) -> list[tuple[int, ...]]:
        """Tokenize the prompts; long ones in another thread, so that other requests continue meanwhile."""

        def tokens() -> list[tuple[int, ...]]:
            if isinstance(request, ChatRequest):
                messages = [message.plain() for message in request.messages]
                return [chat_tokens(self._tokenizer, messages, request.chat_template_kwargs)]
            return [prompt_tokens(self._tokenizer, prompt) for prompt in request.prompts]

        if request.characters < LONG_CHARACTERS:
            return tokens()
        # One at a time: the Python code of a tokenizer is not safe for several threads.
        async with self._tokenizing:
            return await asyncio.to_thread(tokens)

    def _limit(self, request: ChatRequest | CompletionRequest, prompt: int) -> int:
        """Return how many tokens a request may generate.

        Raises:
            BadRequestError: if it asks for more than the server allows.
            ContextLengthError: if it does not fit into the context.
        """
        most = self._config.max_new_tokens
        asked = request.limit
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        if asked is not None and asked > most:
            name = "max_tokens" if asked == request.max_tokens else "max_completion_tokens"
            raise BadRequestError(f"{name} is {asked}; this server generates at most {most}", param=name)
        # An engine generates at least one token, also for max_tokens: 0.
        least = asked or 1
        if prompt + least > self._room:
            made = "at least one is" if least == 1 else f"{least} are to be"
            raise ContextLengthError(
                f"this model's maximum context length is {self._room} tokens, but the prompt has {prompt} "
                f"and {made} generated; shorten the prompt{'' if least == 1 else ' or lower max_tokens'}",
                param=param,
            )
        return min(request.default_max_tokens or most, most, self._room - prompt) if asked is None else asked

    def __del__(self) -> None:
        engine, copies = getattr(self, "_engine", None), getattr(self, "_copies", None)
        if engine is not None:
            engine.stop()
        if copies is not None and ending():
            copies.remove()


def in_turns(
    choices: list[AsyncGenerator[Progress, None]], most: int
) -> list[AsyncGenerator[Progress, None]]:
    """Limit how many choices of a request the engine generates at once; the others wait for their turn.

    Args:
        choices: the choices, none of which has begun.
        most: largest number at once.
    """
    turns = asyncio.Semaphore(most)

    async def in_turn(steps: AsyncGenerator[Progress, None]) -> AsyncGenerator[Progress, None]:
        async with turns, aclosing(steps):
            async for step in steps:
                yield step

    return [in_turn(steps) for steps in choices] if len(choices) > most else choices


async def until_beat(seconds: float) -> None:
    """Wait until the next multiple of an interval.

    All that wait wake at the same moment, so that what they send then travels together.
    """
    await asyncio.sleep(seconds - asyncio.get_running_loop().time() % seconds)


async def merged(parts: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Yield the items of several generators as they come; closing it closes all of them."""
    if len(parts) == 1:
        async with aclosing(parts[0]) as only:
            async for delta in only:
                yield delta
        return
    found: asyncio.Queue[Delta | None] = asyncio.Queue()

    async def drain(part: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(part):
                async for delta in part:
                    found.put_nowait(delta)
        finally:
            found.put_nowait(None)

    tasks = [asyncio.create_task(drain(part)) for part in parts]
    try:
        for _ in parts:
            while (new := await found.get()) is not None:
                yield new
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def bounded(deltas: AsyncGenerator[Delta, None], seconds: float) -> AsyncGenerator[Delta, None]:
    """Yield the items of a generator for a limited time.

    Raises:
        RequestTimeoutError: after `seconds`.
    """
    end = asyncio.get_running_loop().time() + seconds
    async with aclosing(deltas):
        while True:
            try:
                async with asyncio.timeout_at(end):
                    delta = await anext(deltas)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise RequestTimeoutError(
                    f"the answer was not ready after {seconds:g} seconds; ask for less, or raise max_seconds"
                ) from error
            yield delta


def _started(config: ServeConfig, engine: EngineName) -> Started:
    """Start the engine; an error names this node, which may not be the one where the server was started."""
    try:
        return start_engine(config, engine)
    except ModelError as error:
        raise type(error)(
            f"on {gethostname()}: {error}; every node that runs a replica needs the base"
        ) from error


def _bytes(size: str | None) -> int | None:
    return None if size is None else parse_bytes(size)


def _seeds(seed: int | None, choices: int) -> list[int | None]:
    """Return a seed for each choice, or None without one; the first choice has the request's own seed."""
    if seed is None:
        return [None] * choices
    return [derive_seed(seed, "choice", index) if index else seed for index in range(choices)]


ReplicaDeployment = ray_serve.deployment(name="Replica")(Replica)
"""What Ray Serve runs; `rayft.serving.build` sets its size and resources."""

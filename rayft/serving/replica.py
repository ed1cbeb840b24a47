"""One replica: the base in memory, an engine, the catalog, and the way from a request to text."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

import ray.serve as ray_serve
import torch

from rayft.errors import ArtifactError, BadRequestError, ResourceError
from rayft.models.load import load_model
from rayft.models.targets import linear_shapes
from rayft.numerics import derive_seed, fastest_cpu_dtype
from rayft.serving.catalog import BaseModel, Catalog
from rayft.serving.config import ServeConfig
from rayft.serving.engine import Engine, EngineLimits, GenerationRequest
from rayft.serving.messages import Delta, ModelCard
from rayft.serving.packed_engine import PackedEngine
from rayft.serving.schemas import ChatRequest, CompletionRequest
from rayft.serving.text import TextStream, chat_tokens, prompt_tokens, score
from rayft.serving.transformers_engine import TransformersEngine

__all__ = ["Replica", "ReplicaDeployment", "compute_dtype"]


logger = logging.getLogger("ray.serve")


class Replica:
    """Answers requests; Ray Serve makes and feeds it."""

    def __init__(self, config: ServeConfig, device: str) -> None:
        """Load the base; adapters come by `reconfigure`.

        Raises:
            ModelError: if the base can't be loaded.
        """
        # Ray sets OMP_NUM_THREADS for its workers, but torch may have been imported with another value.
        torch.set_num_threads(config.cpus)
        dtype = compute_dtype(config, device)
        loaded = load_model(config.model, dtype, device)
        base = BaseModel(config.model.name, loaded.fingerprint, linear_shapes(loaded.model))
        limits = EngineLimits(config.max_running, config.max_batch_tokens, config.cache_tokens)
        self._config, self._tokenizer = config, loaded.tokenizer
        self._configured = False
        self._room = min(loaded.context, config.cache_tokens)
        packed = config.engine == "packed" or (config.engine == "auto" and device == "cpu")
        self._engine: Engine = (PackedEngine if packed else TransformersEngine)(loaded, limits)
        self._catalog = Catalog(base, self._engine, dtype, device)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve exactly the adapters of `user_config`; Ray Serve calls this on every replica.

        Raises:
            ArtifactError: if one can't be served when the replica starts. Later, what was served is
                served on, since Ray Serve would replace the replica by one that can't start;
                `stats` and the log tell what was refused.
        """
        try:
            await self._catalog.sync(user_config.get("adapters") or {})
        except ArtifactError as error:
            if not self._configured:
                raise
            logger.warning("the change of adapters was refused, the old ones are served on: %s", error)
        self._configured = True

    def check_health(self) -> None:
        """Tell Ray Serve to replace the replica once its engine has stopped.

        Raises:
            ResourceError: if it has.
        """
        if not self._engine.stats().alive:
            raise ResourceError("the engine has stopped; see the replica's log")

    async def models(self) -> list[ModelCard]:
        """List what is served."""
        return self._catalog.cards()

    async def stats(self) -> dict[str, Any]:
        """Report what the engine has done, and why the last change of adapters was refused, if it was."""
        return {"refused": self._catalog.refused, "engine": asdict(self._engine.stats())}

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncIterator[Delta]:
        """Answer a request piece by piece.

        Raises:
            UnknownModelError: if its model is not served.
            BadRequestError: if it does not fit, or is above a limit.
        """
        with self._catalog.lease(request.model) as adapter:
            prompts = self._prompts(request)
            jobs = [
                GenerationRequest(
                    prompt=prompt,
                    max_tokens=self._limit(request, len(prompt)),
                    adapter=adapter,
                    temperature=1.0 if request.temperature is None else request.temperature,
                    top_p=1.0 if request.top_p is None else request.top_p,
                    seed=seed,
                    logprobs=request.scored,
                )
                for prompt in prompts
                for seed in _seeds(request.seed, request.choices)
            ]
            total = sum(map(len, prompts))
            yield Delta("", total, 0)
            choices = [self._choice(job, request, index, total) for index, job in enumerate(jobs)]
            async with aclosing(merged(choices)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _choice(
        self, job: GenerationRequest, request: ChatRequest | CompletionRequest, index: int, prompt_tokens: int
    ) -> AsyncGenerator[Delta, None]:
        """Generate one choice."""
        text, told = TextStream(self._tokenizer, request.stops), 0
        async with aclosing(self._engine.submit(job)) as steps:
            async for step in steps:
                new = text.push(step.tokens, last=step.finish is not None)
                finish = "stop" if text.stopped else step.finish
                if new or finish:
                    fresh = step.logprobs[told:]
                    scores = tuple(score(self._tokenizer, entry) for entry in fresh)
                    told += len(fresh)
                    yield Delta(new, prompt_tokens, step.generated, finish, index, scores)
                if text.stopped:
                    return

    def _prompts(self, request: ChatRequest | CompletionRequest) -> list[tuple[int, ...]]:
        if isinstance(request, ChatRequest):
            return [chat_tokens(self._tokenizer, [message.plain() for message in request.messages])]
        return [prompt_tokens(self._tokenizer, prompt) for prompt in request.prompts]

    def _limit(self, request: ChatRequest | CompletionRequest, prompt: int) -> int:
        """Decide how many tokens a request may generate, refusing one that does not fit."""
        most = self._config.max_new_tokens
        asked = request.limit
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        if asked is not None and asked > most:
            raise BadRequestError(
                f"max_tokens is {asked}; at most {most} are generated here", param="max_tokens"
            )
        if prompt + (asked or 1) > self._room:
            raise BadRequestError(
                f"the maximum context length is {self._room} tokens, but the prompt has {prompt} and "
                f"{asked or 1} are to be generated; shorten the prompt or lower max_tokens",
                param=param,
            )
        return asked or min(most, self._room - prompt)

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.stop()


async def merged(parts: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Give what several generators give, as it comes; closing it closes them all."""
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


def _seeds(seed: int | None, choices: int) -> list[int]:
    """Give each choice a seed of its own: the first the request's."""
    first = random.getrandbits(63) if seed is None else seed
    return [derive_seed(first, "choice", index) if index else first for index in range(choices)]


ReplicaDeployment = ray_serve.deployment(name="Replica")(Replica)
"""What Ray Serve runs; `rayft.serving.build` sets its size and resources."""


def compute_dtype(config: ServeConfig, device: str) -> torch.dtype:
    """Choose the dtype of weights and arithmetic."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else fastest_cpu_dtype()
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]

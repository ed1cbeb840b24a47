"""rayft's own engine, for CPUs: continuous batching over packed tokens.

In each forward the next tokens of all sequences that decode, and chunks of the prompts of those that have
just come, lie end to end in one batch. `scheduler` decides which tokens these are, `runner` runs the model
over them, `sampling` chooses the next tokens, and the engine delivers them.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rayft.artifacts import AdapterArtifact
from rayft.errors import BadRequestError, RayftError, RequestError, ResourceError
from rayft.serving.engine import api
from rayft.serving.engine.api import EngineLimits, EngineStats, GenerationRequest, Progress, TokenLogprob
from rayft.serving.engine.cpu import scheduler
from rayft.serving.engine.cpu.runner import Runner
from rayft.serving.engine.cpu.sampling import Draw, choose, finite_rows, logprobs
from rayft.serving.engine.cpu.scheduler import Chunk, Scheduler
from rayft.serving.engine.cpu.slots import Slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CpuEngine"]


class CpuEngine:
    """Runs a model in a thread of its own; see `rayft.serving.engine.api.Engine`."""

    def __init__(self, model: PreTrainedModel, ends: Sequence[int], limits: EngineLimits) -> None:
        """Prepare the model and start the thread; nothing else may run the model from now on.

        Args:
            model: the base, on the CPU.
            ends: the tokens that end every text.
            limits: the limits of the engine.

        Raises:
            ModelError: if the model has layers or attention that this engine does not support.
        """
        self._slots = Slots(model, model.dtype)
        self._runner = Runner(model, self._slots)
        self._ends = frozenset(ends)
        embeddings: Any = model.get_input_embeddings()
        self._vocabulary = len(embeddings.weight)
        self._scheduler = Scheduler(limits)
        self._stats = EngineStats(True, 0, 0, 0, 0, 0)
        self._alive = True
        self._changed = threading.Condition()
        """Held to use the scheduler, which several threads do, and notified of new sequences and the stop."""
        self._thread = threading.Thread(target=self._run, name="rayft-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> AsyncGenerator[Progress, None]:
        """Generate, and yield the progress after each step, or the end; closing it ends the request.

        Raises:
            BadRequestError: at once, if a JSON schema is to be followed, or the model does not have a token.
            ResourceError: during the iteration, if the engine has stopped.
            RequestError: during the iteration, if the engine fails.
        """
        if request.json_schema is not None:
            raise BadRequestError(api.NO_SCHEMA, param="response_format")
        api.check_prompt(request.prompt, self._vocabulary)
        if request.seed is None:
            request = replace(request, seed=secrets.randbits(63))
        return self._generate(request)

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[Progress, None]:
        queue: asyncio.Queue[Progress | RayftError] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(news: Progress | RayftError) -> None:
            # A loop that was closed meanwhile has no one who waits.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, news)

        slot = self._slots.slot(request.adapter, request.rank)
        sequence = scheduler.Sequence(request, slot, deliver)
        with self._changed:
            if not self._alive:
                raise ResourceError(api.STOPPED)
            self._scheduler.add(sequence)
            self._changed.notify()
        try:
            while True:
                news = await queue.get()
                while not queue.empty():  # Each has all tokens so far, so that the last one is enough.
                    news = queue.get_nowait()
                if isinstance(news, RayftError):
                    raise news
                yield news
                if news.finish is not None:
                    return
        finally:
            sequence.ended = True

    async def load(self, name: str, artifact: AdapterArtifact) -> None:
        """Make an adapter usable under a new name, at its own rank and, if it was squeezed, at lower ones."""
        # A thread goes on when the load is cancelled: what it makes must not be in the model then.
        self._slots.load(name, await asyncio.to_thread(self._slots.cast, artifact))

    def unload(self, name: str) -> None:
        """Free an adapter that no running request uses, at all its ranks."""
        self._slots.unload(name)

    def stats(self) -> EngineStats:
        """Return whether the engine is alive, and its counts."""
        with self._changed:
            return replace(self._stats, alive=self._alive, running=self._scheduler.unfinished)

    def stop(self) -> None:
        """Fail all running requests, and end the thread."""
        with self._changed:
            self._alive = False
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        """Generate until the engine is stopped or fails (the engine's thread)."""
        error: RayftError = ResourceError("the engine was stopped; ask again")
        try:
            while batch := self._next_batch():
                self._step(batch)
        except Exception as problem:
            # Whatever it is, clients that wait must be told.
            error = RequestError(f"the engine failed: {type(problem).__name__}: {problem}")
            raise
        finally:
            with self._changed:
                self._alive = False
                left = self._scheduler.drain()
            for sequence in left:
                sequence.deliver(error)

    def _next_batch(self) -> list[Chunk]:
        """Wait until there is something to do, and return it; nothing if the engine was stopped."""
        with self._changed:
            while self._alive:
                if batch := self._scheduler.schedule():
                    return batch
                self._changed.wait()
        return []

    def _step(self, batch: list[Chunk]) -> None:
        """Run a forward, and deliver the next token of each sequence whose tokens are all processed."""
        logits = self._runner.run(batch)
        complete = [chunk.sequence for chunk in batch if chunk.complete]
        draws = [Draw.of(sequence.request, sequence.generated, sequence.seen) for sequence in complete]
        tokens = choose(logits, draws).tolist()
        finite = finite_rows(logits)
        entries = logprobs(logits, tokens, [sequence.request.logprobs for sequence in complete])
        self._count(batch)
        for sequence, token, good, entry in zip(complete, tokens, finite, entries, strict=True):
            if good and sequence.finite:
                progress = self._append(sequence, token, entry)
                if sequence.request.progress or progress.finish is not None:
                    sequence.deliver(progress)
            else:
                sequence.ended = True
                sequence.deliver(RequestError(api.NOT_FINITE))

    def _append(self, sequence: scheduler.Sequence, token: int, entry: TokenLogprob | None) -> Progress:
        """Append a token to a sequence, and return its progress."""
        request, prompt = sequence.request, tuple(sequence.prompt_logprobs)
        if request.max_tokens == 0:
            sequence.ended = True
            return Progress((), 0, "length", prompt=prompt)
        sequence.tokens.append(token)
        if sequence.first_token_seconds is None:
            sequence.first_token_seconds = time.monotonic() - sequence.submitted
        if sequence.seen is not None:
            sequence.seen.add(token)
        ended = token in self._ends or token in request.stop_tokens
        if entry is not None and not ended:
            sequence.logprobs.append(entry)
        full = sequence.generated >= request.max_tokens
        # Only ever set: meanwhile the client may have left.
        if ended or full:
            sequence.ended = True
        generated = tuple(sequence.tokens[len(request.prompt) :])
        return Progress(
            generated[:-1] if ended else generated,
            len(generated),
            "stop" if ended else "length" if full else None,
            tuple(sequence.logprobs),
            prompt,
            entry if ended else None,
            sequence.first_token_seconds,
        )

    def _count(self, batch: list[Chunk]) -> None:
        before, slots = self._stats, {chunk.sequence.slot for chunk in batch}
        self._stats = replace(
            before,
            forwards=before.forwards + 1,
            tokens=before.tokens + batch[-1].end,
            max_requests_in_forward=max(before.max_requests_in_forward, len(batch)),
            max_slots_in_forward=max(before.max_slots_in_forward, len(slots)),
        )

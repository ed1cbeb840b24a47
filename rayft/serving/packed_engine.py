"""rayft's own engine: continuous batching over packed tokens, each request with its own keys and values.

In each forward the next tokens of all running requests, and parts of the prompts of those that have just
come, lie end to end in one row; every linear layer sees them as one matrix. Attention takes them apart
again: a request's tokens attend to the request's own keys and values, as far as they go. So nothing is
padded to the longest, no mask between requests is made, and what overflows in one stays in it. How that is
done on a CPU and on a GPU is `packed_forward` and `paged_forward`.

Keys and values are allocated in pages as a request grows. Where they would exceed the limit, the youngest
request gives its own up and is read again later; its answer stays the same.

transformers is touched through what it makes public: an attention function of our own (`AttentionInterface`),
for which no mask is made, and `logits_to_keep`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rayft.errors import ModelError, RayftError, RequestError, ResourceError
from rayft.methods.base import LoraFactors
from rayft.models.load import LoadedModel
from rayft.serving.engine import (
    NOT_FINITE,
    STOPPED,
    EngineLimits,
    EngineStats,
    GenerationRequest,
    Progress,
    TokenLogprob,
    end_tokens,
)
from rayft.serving.packed_forward import OwnForward
from rayft.serving.packed_row import ATTENTION, Forward, Part, Row, pages
from rayft.serving.paged_forward import PagedForward
from rayft.serving.sampling import Draw, Seen, choose, finite_rows, logprobs
from rayft.serving.slots import Slots

__all__ = ["PackedEngine"]


class PackedEngine:
    """Runs a model in a thread of its own; see `rayft.serving.engine.Engine`."""

    def __init__(self, loaded: LoadedModel, limits: EngineLimits, *, paged: bool | None = None) -> None:
        """Take the model over: its linears are replaced, and nothing else may run it from now on.

        Args:
            loaded: the model.
            limits: what it may hold.
            paged: whether keys and values lie in one pool; where not given, on a GPU.

        Raises:
            ModelError: if its attention is not of the kind that this engine knows.
        """
        self._model: Any = loaded.model.eval()
        gpu = self._model.device.type == "cuda"
        if gpu and self._model.dtype == torch.float32:
            raise ModelError(
                "on a GPU this engine wants 16 bits; set dtype: bfloat16, or engine: transformers"
            )
        paged = gpu if paged is None else paged
        self._model.set_attn_implementation(ATTENTION)
        self._slots = Slots(self._model)
        self._forward: Forward = OwnForward(self._model, self._slots)
        if paged:
            self._forward = PagedForward(self._model, self._slots, limits, graphs=gpu)
        self._limits = limits
        self._ends = frozenset(end_tokens(loaded))
        self._stats = EngineStats(True, 0, 0, 0, 0, 0)
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._work = threading.Condition()
        self._try_out()
        self._thread = threading.Thread(target=self._run, name="rayft-engine", daemon=True)
        self._thread.start()

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Progress, None]:
        """Generate, giving progress as it comes; closing the iterator ends the request.

        Raises:
            ResourceError: if the engine has stopped.
            RequestError: if it fails while the request runs.
        """
        progress: asyncio.Queue[Progress | RayftError] = asyncio.Queue()
        slot = self._slots.slot(request.adapter)
        loop, cache = asyncio.get_running_loop(), self._forward.fresh()
        row = Row(request, slot, loop, progress, list(request.prompt), cache, Seen.of(request))
        with self._work:
            if not self._stats.alive:
                raise ResourceError(STOPPED)
            self._waiting.append(row)
            self._work.notify()
        try:
            while True:
                found = await progress.get()
                while not progress.empty():  # Each holds all tokens so far: the last one will do.
                    found = progress.get_nowait()
                if isinstance(found, RayftError):
                    raise found
                yield found
                if found.finish is not None:
                    return
        finally:
            row.ended = True

    def load(self, name: str, factors: Mapping[str, LoraFactors]) -> None:
        """Make an adapter usable under a name that is not in use."""
        self._slots.load(name, factors)

    def unload(self, name: str) -> None:
        """Free an adapter that no running request uses."""
        self._slots.unload(name)

    def stats(self) -> EngineStats:
        """Report health and work done."""
        with self._work:
            rows = [*self._running, *self._waiting]
        return replace(self._stats, running=sum(not row.ended for row in rows))

    def stop(self) -> None:
        """Fail what still runs and free the model."""
        with self._work:
            self._stats = replace(self._stats, alive=False)
            self._work.notify()
        self._thread.join()

    def _try_out(self) -> None:
        """Run two tokens and one more, so that a model that this engine can't run is refused at the start."""
        cache = self._forward.fresh()
        row = Row(GenerationRequest((0, 0), 1), 0, None, None, [0, 0], cache)  # type: ignore[arg-type]
        for _ in range(2):
            self._step([row], deliver=False)
            row.tokens.append(0)
        self._forward.release(row.cache)
        layers, known = self._model.config.get_text_config().num_hidden_layers, len(self._forward.layers)
        if known != layers:
            raise ModelError(
                f"{known} of the model's {layers} layers have an attention that this engine knows; "
                "set engine: transformers"
            )

    def _run(self) -> None:
        """Generate until stopped (the engine's thread)."""
        error: RayftError = ResourceError("the engine was stopped; ask again")
        try:
            while True:
                with self._work:
                    self._drop_ended()
                    while self._stats.alive and not self._running and not self._waiting:
                        self._work.wait()
                    if not self._stats.alive:
                        break
                    self._admit()
                if self._running:
                    self._step(self._running)
        except Exception as problem:
            # Whatever it is, those who wait must hear of it.
            error = RequestError(f"the engine failed: {type(problem).__name__}: {problem}")
            raise
        finally:
            with self._work:
                self._stats = replace(self._stats, alive=False)
                left, self._running, self._waiting = [*self._running, *self._waiting], [], deque()
            _tell([(row, error) for row in left])

    def _drop_ended(self) -> None:
        """Take back the places of requests that have ended, or whose client has gone."""
        ended = [row for row in self._running if row.ended]
        for row in ended:
            self._forward.release(row.cache)
        self._running = [row for row in self._running if row not in ended]

    def _admit(self) -> None:
        """Make room for the next step of what runs, then begin with what waits while there is room."""
        while len(self._running) > 1 and self._needed(self._running) > self._limits.cache_tokens:
            youngest = self._running.pop()
            self._forward.release(youngest.cache)
            youngest.cache = self._forward.fresh()
            self._waiting.appendleft(youngest)
        while self._waiting and len(self._running) < self._limits.max_running:
            if self._waiting[0].ended:
                self._waiting.popleft()
                continue
            if self._needed([*self._running, self._waiting[0]]) > self._limits.cache_tokens and self._running:
                break
            self._running.append(self._waiting.popleft())

    def _needed(self, rows: Iterable[Row]) -> int:
        return sum(pages(len(row.tokens)) for row in rows)

    def _step(self, rows: Sequence[Row], *, deliver: bool = True) -> None:
        """Run one forward, and give each row whose tokens are all read its next one."""
        parts = self._parts(rows)
        complete = [part for part in parts if part.complete]
        logits = self._forward.logits(parts)
        for part in parts:
            part.row.cache.length += part.new
        if not deliver:
            return
        draws = [Draw.of(part.row.request, part.row.made, part.row.seen) for part in complete]
        chosen = choose(logits, draws).tolist()
        good = finite_rows(logits)
        scored = logprobs(logits, chosen, [part.row.request.logprobs for part in complete])
        news: list[tuple[Row, Progress | RayftError]] = []
        for part, token, fine, entry in zip(complete, chosen, good, scored, strict=True):
            row = part.row
            if fine:
                news.append((row, self._take(row, token, entry)))
                continue
            row.ended = True
            news.append((row, RequestError(NOT_FINITE)))
        self._count(parts)
        _tell(news)

    def _parts(self, rows: Sequence[Row]) -> list[Part]:
        """Lay tokens end to end: those of rows that generate first, then prompts as far as there is room."""
        room, start, parts = self._limits.max_batch_tokens, 0, []
        for row in sorted(rows, key=lambda row: row.unread > 1):
            new = min(row.unread, max(room, 0) if row.unread > 1 else 1)
            if new:
                parts.append(Part(row, start, start + new))
                start, room = start + new, room - new
        return parts

    def _take(self, row: Row, token: int, entry: TokenLogprob | None) -> Progress:
        """Note a row's new token."""
        row.tokens.append(token)
        if row.seen is not None:
            row.seen.add(token)
        ended = token in self._ends or token in row.request.stop_tokens
        if entry is not None and not ended:
            row.scored.append(entry)
        finish = "stop" if ended else "length" if row.made >= row.request.max_tokens else None
        row.ended = row.ended or finish is not None
        made = tuple(row.tokens[len(row.request.prompt) :])
        return Progress(made[:-1] if ended else made, len(made), finish, tuple(row.scored))  # type: ignore[arg-type]

    def _count(self, parts: Sequence[Part]) -> None:
        before, slots = self._stats, {part.row.slot for part in parts}
        self._stats = replace(
            before,
            forwards=before.forwards + 1,
            tokens=before.tokens + parts[-1].end,
            max_requests_in_forward=max(before.max_requests_in_forward, len(parts)),
            max_slots_in_forward=max(before.max_slots_in_forward, len(slots)),
        )


def _tell(news: Sequence[tuple[Row, Progress | RayftError]]) -> None:
    """Hand out progress, with one call for each event loop that waits."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Row, Progress | RayftError]]] = {}
    for row, what in news:
        by_loop.setdefault(row.loop, []).append((row, what))

    def put(mine: list[tuple[Row, Progress | RayftError]]) -> None:
        for row, what in mine:
            row.progress.put_nowait(what)

    for loop, mine in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(put, mine)

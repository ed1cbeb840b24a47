"""The engine for CPUs: continuous batching over packed tokens, each request with its own keys and values.

In each forward the next tokens of all running requests, and parts of the prompts of those that have just
come, lie end to end in one row; every linear layer sees them as one matrix. Attention takes them apart
again: a request's tokens attend to the request's own keys and values, as far as they go. So nothing is
padded to the longest, no mask between requests is made, and what overflows in one stays in it.

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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

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
from rayft.serving.sampling import Draw, choose, finite_rows, logprobs, uniform
from rayft.serving.slots import Slots

__all__ = ["PackedEngine"]

ATTENTION = "rayft_packed"
PAGE = 64
"""Tokens by which a request's keys and values grow."""


class _KeysValues:
    """One request's keys and values: for each layer (2 × heads × capacity × head size)."""

    def __init__(self) -> None:
        self.length = 0
        """Tokens in it; set when a forward is over, for its layers come one after the other."""
        self._layers: dict[int, torch.Tensor] = {}

    def append(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new ones (2 × heads × new × size), give all (1 × heads × (length + new) × size, twice)."""
        end = self.length + new.shape[2]
        held = self._layers.get(layer)
        if held is None or held.shape[2] < end:
            grown = new.new_empty(2, new.shape[1], pages(end), new.shape[3])
            if held is not None:
                grown[:, :, : self.length] = held[:, :, : self.length]
            self._layers[layer] = held = grown
        held[:, :, self.length : end] = new
        keys, values = held[:, :, :end].split(1)
        return keys, values


def pages(tokens: int) -> int:
    """Round up to whole pages."""
    return -(-tokens // PAGE) * PAGE


@dataclass(eq=False)
class _Row:
    """A request in the engine."""

    request: GenerationRequest
    slot: int
    loop: asyncio.AbstractEventLoop
    progress: asyncio.Queue[Progress | RayftError]
    tokens: list[int]
    """Prompt and what was generated."""
    cache: _KeysValues = field(default_factory=_KeysValues)
    scored: list[TokenLogprob] = field(default_factory=list)
    ended: bool = False

    @property
    def unread(self) -> int:
        """Tokens whose keys and values are not there yet."""
        return len(self.tokens) - self.cache.length

    @property
    def made(self) -> int:
        """Tokens that were generated."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True)
class _Part:
    """A row's tokens in a forward."""

    row: _Row
    start: int
    end: int


class _Forward(threading.local):
    """The forward that runs now in a thread."""

    def __init__(self) -> None:
        self.parts: Sequence[_Part] = ()
        self.layers: set[int] = set()


_forward = _Forward()


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each request: query (1 × heads × N × size), key and value with their own heads.

    There is no mask: transformers makes none for functions that it doesn't know.
    """
    assert attention_mask is None
    known = {"dropout", "position_ids", "is_causal", "use_cache", "output_attentions"}
    other = [name for name, given in options.items() if given is not None and name not in known]
    if other:
        raise ModelError(
            f"attention with {', '.join(other)} is not known to this engine; set engine: transformers"
        )
    _forward.layers.add(module.layer_idx)
    _, heads, total, size = query.shape
    shared = key.shape[1]
    out = query.new_empty(1, total, heads, size)
    both = torch.cat((key, value))
    for part in _forward.parts:
        here = slice(part.start, part.end)
        k, v = part.row.cache.append(module.layer_idx, both[:, :, here])
        new, length = part.end - part.start, k.shape[2]
        if new == 1:
            # Heads that share keys are as so many questions to them; all keys are in its past.
            if sliding_window is not None:
                k, v = k[:, :, -sliding_window:], v[:, :, -sliding_window:]
            asked = query[:, :, part.start].view(1, shared, heads // shared, size)
            # With four dimensions the fused kernel is taken, with three the slow one.
            found = functional.scaled_dot_product_attention(asked, k, v, scale=scaling)
            out[0, part.start] = found.view(heads, -1)
            continue
        k, v = (one.repeat_interleave(heads // shared, 1) for one in (k, v))
        mask = None
        if length > new or (sliding_window is not None and length > sliding_window):
            apart = torch.arange(length - new, length)[:, None] - torch.arange(length)
            mask = (apart >= 0) & (apart < (sliding_window or length))
        found = functional.scaled_dot_product_attention(
            query[:, :, here], k, v, mask, is_causal=mask is None, scale=scaling
        )
        out[0, here] = found[0].transpose(0, 1)
    return out, None


AttentionInterface.register(ATTENTION, _attention)


class PackedEngine:
    """Runs a model in a thread of its own; see `rayft.serving.engine.Engine`."""

    def __init__(self, loaded: LoadedModel, limits: EngineLimits) -> None:
        """Take the model over: its linears are replaced, and nothing else may run it from now on.

        Raises:
            ModelError: if its attention is not of the kind that this engine knows.
        """
        self._model: Any = loaded.model.eval()
        self._model.set_attn_implementation(ATTENTION)
        self._slots = Slots(self._model)
        self._limits = limits
        self._ends = frozenset(end_tokens(loaded))
        self._stats = EngineStats(True, 0, 0, 0, 0, 0)
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
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
        row = _Row(request, slot, asyncio.get_running_loop(), progress, list(request.prompt))
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
        row = _Row(GenerationRequest((0, 0), 1), 0, None, None, [0, 0])  # type: ignore[arg-type]
        for _ in range(2):
            self._step([row], deliver=False)
            row.tokens.append(0)
        layers = self._model.config.get_text_config().num_hidden_layers
        if len(_forward.layers) != layers:
            raise ModelError(
                f"{len(_forward.layers)} of the model's {layers} layers have an attention that this engine "
                "knows; set engine: transformers"
            )

    def _run(self) -> None:
        """Generate until stopped (the engine's thread)."""
        error: RayftError = ResourceError("the engine was stopped; ask again")
        try:
            while True:
                with self._work:
                    self._running = [row for row in self._running if not row.ended]
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

    def _admit(self) -> None:
        """Make room for the next step of what runs, then begin with what waits while there is room."""
        while len(self._running) > 1 and self._needed(self._running) > self._limits.cache_tokens:
            youngest = self._running.pop()
            youngest.cache = _KeysValues()
            self._waiting.appendleft(youngest)
        while self._waiting and len(self._running) < self._limits.max_running:
            if self._waiting[0].ended:
                self._waiting.popleft()
                continue
            if self._needed([*self._running, self._waiting[0]]) > self._limits.cache_tokens and self._running:
                break
            self._running.append(self._waiting.popleft())

    def _needed(self, rows: Iterable[_Row]) -> int:
        return sum(pages(len(row.tokens)) for row in rows)

    def _step(self, rows: Sequence[_Row], *, deliver: bool = True) -> None:
        """Run one forward, and give each row whose tokens are all read its next one."""
        parts = self._parts(rows)
        complete = [part for part in parts if part.end - part.start == part.row.unread]
        logits = self._logits(parts, complete)
        for part in parts:
            part.row.cache.length += part.end - part.start
        if not deliver:
            return
        draws = [_draw(part.row) for part in complete]
        chosen = choose(logits, draws).tolist()
        good = finite_rows(logits)
        scored = logprobs(logits, chosen, [part.row.request.logprobs for part in complete])
        news: list[tuple[_Row, Progress | RayftError]] = []
        for part, token, fine, entry in zip(complete, chosen, good, scored, strict=True):
            row = part.row
            if fine:
                news.append((row, self._take(row, token, entry)))
                continue
            row.ended = True
            news.append((row, RequestError(NOT_FINITE)))
        self._count(parts)
        _tell(news)

    def _parts(self, rows: Sequence[_Row]) -> list[_Part]:
        """Lay tokens end to end: those of rows that generate first, then prompts as far as there is room."""
        room, start, parts = self._limits.max_batch_tokens, 0, []
        for row in sorted(rows, key=lambda row: row.unread > 1):
            new = min(row.unread, max(room, 0) if row.unread > 1 else 1)
            if new:
                parts.append(_Part(row, start, start + new))
                start, room = start + new, room - new
        return parts

    @torch.inference_mode()
    def _logits(self, parts: Sequence[_Part], complete: Sequence[_Part]) -> torch.Tensor:
        """Run the model: the logits after the last token of each complete part (parts × V)."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for part in parts:
            first, new = part.row.cache.length, part.end - part.start
            ids += part.row.tokens[first : first + new]
            positions += range(first, first + new)
            slots += [part.row.slot] * new
        self._slots.assign(slots)
        _forward.parts = parts
        kept = torch.tensor([part.end - 1 for part in complete], dtype=torch.long)
        output = self._model(
            input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False,
            logits_to_keep=kept,
        )  # fmt: skip
        return output.logits[0]  # type: ignore[no-any-return]

    def _take(self, row: _Row, token: int, entry: TokenLogprob | None) -> Progress:
        """Note a row's new token."""
        row.tokens.append(token)
        ended = token in self._ends
        if entry is not None and not ended:
            row.scored.append(entry)
        finish = "stop" if ended else "length" if row.made >= row.request.max_tokens else None
        row.ended = row.ended or finish is not None
        made = tuple(row.tokens[len(row.request.prompt) :])
        return Progress(made[:-1] if ended else made, len(made), finish, tuple(row.scored))  # type: ignore[arg-type]

    def _count(self, parts: Sequence[_Part]) -> None:
        before, slots = self._stats, {part.row.slot for part in parts}
        self._stats = replace(
            before,
            forwards=before.forwards + 1,
            tokens=before.tokens + parts[-1].end,
            max_requests_in_forward=max(before.max_requests_in_forward, len(parts)),
            max_slots_in_forward=max(before.max_slots_in_forward, len(slots)),
        )


def _draw(row: _Row) -> Draw:
    request = row.request
    point = uniform(request.seed, row.made) if request.temperature > 0 else 0.0
    return Draw(request.temperature, request.top_p, point)


def _tell(news: Sequence[tuple[_Row, Progress | RayftError]]) -> None:
    """Hand out progress, with one call for each event loop that waits."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Row, Progress | RayftError]]] = {}
    for row, what in news:
        by_loop.setdefault(row.loop, []).append((row, what))

    def put(mine: list[tuple[_Row, Progress | RayftError]]) -> None:
        for row, what in mine:
            row.progress.put_nowait(what)

    for loop, mine in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(put, mine)

"""Decides which sequences run in the next forward, and with which of their tokens.

Sequences that decode run in every forward. Prompts share what is left of `max_batch_tokens`, the oldest
first; one that does not fit is prefilled in chunks. If the KV cache is full, the youngest sequence is
preempted: its keys and values are freed, and it waits until there is room to process its tokens again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rayft.errors import RayftError
from rayft.kernels.segment_lora import BASE_SLOT
from rayft.serving.engine.api import EngineLimits, GenerationRequest, Progress, TokenLogprob
from rayft.serving.engine.cpu.kv_cache import KVCache, page_tokens
from rayft.serving.engine.cpu.sampling import Seen

__all__ = ["MAX_SCORED", "Chunk", "Scheduler", "Sequence"]

MAX_SCORED = 128
"""Largest number of tokens of scored prompts in one forward: each needs a row of logits."""


@dataclass(eq=False)
class Sequence:
    """A request in the engine."""

    request: GenerationRequest
    slot: int = BASE_SLOT
    """Slot of its adapter."""
    deliver: Callable[[Progress | RayftError], object] = lambda _: None
    """Called with its progress after each step, or with the error that ended it."""
    tokens: list[int] = field(init=False)
    """Tokens of the prompt, followed by the generated ones."""
    cache: KVCache = field(default_factory=KVCache)
    seen: Seen | None = field(init=False)
    """The set of its tokens, if it has a repetition penalty."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Log-probabilities of the generated tokens, if requested."""
    prompt_logprobs: list[TokenLogprob | None] = field(init=False)
    """Log-probabilities of the prompt's tokens that were computed so far, if requested; the first token has
    none."""
    finite: bool = True
    """Whether all of `prompt_logprobs` are finite."""
    submitted: float = field(default_factory=time.monotonic)
    """When it was created, in seconds of the monotonic clock."""
    first_token_seconds: float | None = None
    """Time from then to its first token."""
    ended: bool = False
    """Whether it is finished, or its client has left."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.seen = Seen.of(self.request)
        self.prompt_logprobs = [None] if self.request.score_prompt else []

    @property
    def uncached(self) -> int:
        """Number of tokens that were not processed yet: 1 while it decodes."""
        return len(self.tokens) - self.cache.length

    @property
    def generated(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt's tokens still have to be computed."""
        return self.request.score_prompt and len(self.prompt_logprobs) < len(self.request.prompt)


@dataclass(frozen=True)
class Chunk:
    """The tokens of one sequence in a batch: the first ones that are not in its KV cache."""

    sequence: Sequence
    start: int
    """Index of the first of them in the batch."""
    size: int
    """Number of tokens."""
    complete: bool
    """Whether these are all tokens of the sequence that were left, so that the next one can be sampled."""

    @property
    def end(self) -> int:
        """Index in the batch after the last token."""
        return self.start + self.size

    @property
    def scored(self) -> range:
        """Positions in the sequence of the tokens whose logits score the next token of the prompt.

        A sequence that was preempted has the log-probabilities that were computed before; they are not
        computed again.
        """
        sequence, first = self.sequence, self.sequence.cache.length
        if not sequence.scoring:
            return range(0)
        last = min(first + self.size, len(sequence.request.prompt) - 1)
        return range(max(first, len(sequence.prompt_logprobs) - 1), last)

    @property
    def logit_indices(self) -> list[int]:
        """Indices in the batch of the tokens whose logits are needed."""
        shift = self.start - self.sequence.cache.length
        scored = [position + shift for position in self.scored]
        return [*scored, self.end - 1] if self.complete else scored


class Scheduler:
    """The sequences of an engine, in the order in which they came."""

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def unfinished(self) -> int:
        """Number of sequences that have not ended."""
        return sum(not sequence.ended for sequence in (*self._running, *self._waiting))

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait until there is room."""
        self._waiting.append(sequence)

    def drain(self) -> list[Sequence]:
        """Remove and return all sequences."""
        left = [*self._running, *self._waiting]
        self._running, self._waiting = [], deque()
        return left

    def schedule(self) -> list[Chunk]:
        """Return the next batch, which is empty only if no sequence is left."""
        self._drop_ended()
        while len(self._running) > 1 and not self._fit(self._running):
            self._preempt()
        while self._waiting and len(self._running) < self._limits.max_running:
            # A sequence that is alone always runs, since the server admits none that the cache can't hold.
            if self._running and not self._fit([*self._running, self._waiting[0]]):
                break
            self._running.append(self._waiting.popleft())
        return self._chunks()

    def _drop_ended(self) -> None:
        running, self._running = self._running, []
        for sequence in running:
            if sequence.ended:
                sequence.cache.clear()
            else:
                self._running.append(sequence)
        self._waiting = deque(sequence for sequence in self._waiting if not sequence.ended)

    def _fit(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether the KV cache has room for sequences, including their tokens of the next forward."""
        return sum(page_tokens(len(one.tokens)) for one in sequences) <= self._limits.cache_tokens

    def _preempt(self) -> None:
        youngest = self._running.pop()
        youngest.cache.clear()
        self._waiting.appendleft(youngest)

    def _chunks(self) -> list[Chunk]:
        """Lay out tokens of the running sequences end to end: those that decode first, then prompts."""
        room, scored, start = self._limits.max_batch_tokens, MAX_SCORED, 0
        chunks = []
        for sequence in sorted(self._running, key=lambda sequence: sequence.uncached > 1):
            size = 1 if sequence.uncached == 1 else min(sequence.uncached, room)
            if sequence.scoring:
                size = min(size, scored)
                scored -= size
            if size > 0:
                chunks.append(Chunk(sequence, start, size, complete=size == sequence.uncached))
                start, room = start + size, room - size
        return chunks

"""The engine on transformers' continuous batching.

Requests join and leave the batch at every step; prompts and single tokens of many requests are
laid end to end in one row of tokens over a paged cache. What is added to it here:

- before each forward, the slot of each token is told to the model's multi-adapter linears;
- each row chooses its token by its own temperature, top-p and seed;
- keys and values are kept finite: the mask between requests only adds to scores, so one adapter that
  overflows would make NaN of all the others' attention.

Blocks of the cache are never shared between requests: the same prompt has other keys and values
under another adapter.

This is the one file that touches what transformers keeps private. It relies on:
`ContinuousBatchingManager._generation_step` running between the preparation of a batch and its
update, in one thread; `batch_processor.inputs_and_outputs.compute_stream` being where the model runs,
and `.requests_in_batch` holding `.state.request_id` and `.query_length` in the order of the tokens;
`logit_processor` being read when the generation thread starts; `cache.update` being the way of all keys
and values.
`tests/unit/serving/test_transformers_engine.py` checks them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
)

from rayft.errors import RequestError, ResourceError
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
from rayft.serving.sampling import Draw, Seen, choose, finite_rows, logprobs
from rayft.serving.slots import Slots

__all__ = ["TransformersEngine"]

LARGEST_STATE = 1e16
"""Keys and values are cut here: far above any that mean something, and no product of two overflows."""

PAGE_TOKENS = 32
"""Tokens in a page of the cache: a request wastes at most one page."""


class TransformersEngine:
    """Runs a model in a thread of its own; see `rayft.serving.engine.Engine`."""

    def __init__(self, loaded: LoadedModel, limits: EngineLimits) -> None:
        """Take the model over: its linears are replaced, and nothing else may run it from now on.

        A request (prompt and tokens to generate) must fit into `limits.cache_tokens`; one that does
        not would stop the generating thread for all.
        """
        self._slots = Slots(loaded.model)
        self._end_tokens = end_tokens(loaded)
        self._numbers = count()
        self._running: dict[str, int] = {}
        self._manager = _Manager(loaded.model, self._end_tokens, limits, self._slots, self._running)
        self._manager.start()

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Progress, None]:
        """Generate, giving progress as it comes; closing the iterator ends the request.

        Raises:
            ResourceError: if the engine has stopped.
            RequestError: if it fails while the request runs.
        """
        name = f"request-{next(self._numbers)}"
        outputs: asyncio.Queue[GenerationOutput] = asyncio.Queue()
        self._running[name] = self._slots.slot(request.adapter)
        if request.logprobs is not None:
            self._manager.scored[name] = (request.logprobs, [])
        self._manager.register_result_handler(name, outputs.put_nowait)
        ended = False
        try:
            if self._manager.accept(name, request) is None:
                raise ResourceError(STOPPED)
            while not ended:
                output = await outputs.get()
                while not outputs.empty():  # Each output holds all tokens so far: the last one will do.
                    output = outputs.get_nowait()
                ended = output.is_finished()
                if output.error is not None:
                    raise RequestError(f"the engine failed: {output.error}")
                if name in self._manager.broken:
                    raise RequestError(NOT_FINITE)
                yield self._progress(output, name, request)
        finally:
            if not ended:
                self._manager.forget(name)
            self._manager.broken.discard(name)
            self._manager.scored.pop(name, None)
            del self._running[name]

    def load(self, name: str, factors: Mapping[str, LoraFactors]) -> None:
        """Make an adapter usable under a name that is not in use."""
        self._slots.load(name, factors)

    def unload(self, name: str) -> None:
        """Free an adapter that no running request uses."""
        self._slots.unload(name)

    def stats(self) -> EngineStats:
        """Report health and work done."""
        return replace(self._manager.stats, alive=self._manager.is_running(), running=len(self._running))

    def stop(self) -> None:
        """Fail what still runs and free the model."""
        if self._manager.is_running():
            self._manager.stop(hard_stop=True)
        self._manager.destroy()

    def _progress(self, output: GenerationOutput, name: str, request: GenerationRequest) -> Progress:
        tokens = tuple(output.generated_tokens)
        last = tokens[-1] if tokens else None
        ended_by_token = last in self._end_tokens or last in request.stop_tokens
        finish = None
        if output.is_finished():
            finish = "stop" if ended_by_token else "length"
        shown = tokens[:-1] if ended_by_token else tokens
        _, scored = self._manager.scored.get(name, (0, []))
        return Progress(shown, len(tokens), finish, tuple(scored[: len(shown)]))  # type: ignore[arg-type]


class _Manager(ContinuousBatchingManager):
    """transformers' manager, telling the slots of each batch before it runs."""

    def __init__(
        self,
        model: Any,
        end_tokens: list[int],
        limits: EngineLimits,
        slots: Slots,
        slot_of_request: Mapping[str, int],
    ) -> None:
        super().__init__(
            model=model,
            # A fresh one: the model's own may ask for processors that don't work on batches.
            generation_config=GenerationConfig(do_sample=False, eos_token_id=end_tokens),
            continuous_batching_config=_batching_config(limits),
        )
        self.broken: set[str] = set()
        """Requests whose logits were not finite."""
        self.scored: dict[str, tuple[int, list[TokenLogprob]]] = {}
        """Requests that want log-probabilities: how many of the likeliest, and what there is so far."""
        sampler = _Sampler(self.broken, self.scored)
        self.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        self.logit_processor.tensors_required = 1
        self.stats = EngineStats(True, 0, 0, 0, 0, 0)
        self._slots = slots
        self._slot_of_request = slot_of_request
        self._end_tokens = end_tokens

    def accept(self, name: str, request: GenerationRequest) -> str | None:
        """Queue a request; None if the generating thread has stopped."""
        return self.add_request(
            list(request.prompt),
            request_id=name,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=[*self._end_tokens, *request.stop_tokens],
            asked=_Asked(request, Seen.of(request)),
        )

    def forget(self, name: str) -> None:
        """Take a request out, wherever it is."""
        with self.output_router._lock:
            self.output_router.result_handlers.pop(name, None)
        self.cancel_request(name)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        update = processor.cache.update

        # What follows them is named up to transformers 5.23 and counted from 5.24 on.
        def bounded(key_states: torch.Tensor, value_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
            if self._slots.in_use:
                key_states, value_states = _bound(key_states), _bound(value_states)
            return update(key_states, value_states, *rest, **named)

        setattr(processor.cache, "update", bounded)  # noqa: B010  (a method, to mypy)
        return processor

    def _generation_step(self) -> None:
        assert self.batch_processor is not None
        inputs = self.batch_processor.inputs_and_outputs
        assert isinstance(inputs, ContinuousBatchingIOs)
        batch = inputs.requests_in_batch
        # A request that was just cancelled is still in this batch, for the last time: any slot will do.
        slots = [self._slot_of_request.get(row.state.request_id, 0) for row in batch]
        lengths = [row.query_length for row in batch]
        stream = inputs.compute_stream
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            self._slots.assign([slot for slot, n in zip(slots, lengths, strict=True) for _ in range(n)])
        super()._generation_step()
        before = self.stats
        self.stats = replace(
            before,
            forwards=before.forwards + 1,
            tokens=before.tokens + sum(lengths),
            max_requests_in_forward=max(before.max_requests_in_forward, len(batch)),
            max_slots_in_forward=max(before.max_slots_in_forward, len(set(slots))),
        )


@dataclass(frozen=True)
class _Asked:
    """What the sampler has to know of a request."""

    request: GenerationRequest
    seen: Seen | None


class _Sampler(ContinuousBatchingLogitsProcessor):
    """Chooses each row's token itself and leaves the likeliest-token step that follows no choice."""

    def __init__(self, broken: set[str], scored: Mapping[str, tuple[int, list[TokenLogprob]]]) -> None:
        self.supported_kwargs = {"asked": _Asked}
        self.ignored_kwargs = ()
        self._draws: list[Draw] = []
        self._names: list[str] = []
        self._broken, self._scored = broken, scored

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Fill the processor's row of the batch's arguments, which it does not use."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """Note the draw of each row that gets a token; the batch is run right after this."""
        self._draws = [_draw(row.state) for row in requests_with_new_token]
        self._names = [row.state.request_id for row in requests_with_new_token]
        return torch.zeros(len(self._draws), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Raise the chosen token of each row above all others: (N × V) → (N × V)."""
        rows = scores[: len(self._draws)]  # Beyond are prompts that are not read to their end.
        self._broken.update(
            name for name, good in zip(self._names, finite_rows(rows), strict=True) if not good
        )
        wanted = [self._scored.get(name) for name in self._names]
        drawn = any(draw.temperature > 0 or draw.seen is not None for draw in self._draws)
        if drawn or any(wanted):
            chosen = choose(rows, self._draws)
            counts = [want[0] if want else None for want in wanted]
            tokens = chosen.tolist()
            for want, entry in zip(wanted, logprobs(rows, tokens, counts), strict=True):
                if want and entry:
                    want[1].append(entry)
            for draw, token in zip(self._draws, tokens, strict=True):
                if draw.seen is not None:
                    draw.seen.add(token)
        if drawn:
            rows.scatter_(1, chosen.unsqueeze(1), torch.inf)
        return scores


def _batching_config(limits: EngineLimits) -> ContinuousBatchingConfig:
    options: dict[str, Any] = {
        "page_size": PAGE_TOKENS,
        "num_blocks": math.ceil(limits.cache_tokens / PAGE_TOKENS),
        "max_batch_tokens": limits.max_batch_tokens,
        "max_requests_per_batch": limits.max_running,
        "allow_block_sharing": False,
        # The slots and draws of a batch are set on the host between its preparation and its forward.
        "use_async_batching": False,
        "use_cuda_graph": False,
        # It may fetch a kernel from the hub.
        "auto_switch_to_flash": False,
    }
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    # transformers 5.17 has another name for pages and no switch for flash attention.
    if "page_size" not in known:
        options["block_size"] = options.pop("page_size")
    if "auto_switch_to_flash" not in known:
        del options["auto_switch_to_flash"]
    return ContinuousBatchingConfig(**options)


def _bound(states: torch.Tensor) -> torch.Tensor:
    return states.clamp(-LARGEST_STATE, LARGEST_STATE).nan_to_num_(nan=0.0)


def _draw(state: RequestState) -> Draw:
    asked: _Asked = state.logit_processor_kwargs["asked"]
    # A request that lost its place in the cache starts again with its tokens as part of the prompt.
    restarted = state._true_initial_tokens
    carried = len(state.initial_tokens) - restarted if restarted else 0
    return Draw.of(asked.request, carried + len(state.generated_tokens), asked.seen)

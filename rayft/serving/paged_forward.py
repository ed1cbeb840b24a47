"""The packed engine's forward on GPUs: all requests' keys and values lie in pages of one pool.

The packed tokens of a forward attend by PyTorch's variable-length flash attention: nothing is padded to the
longest, no mask between requests is made, and what overflows in one stays in it. Keys and values that are in
the pool are gathered before it.

Launches would take most of the time: where each request reads one token, and for prompts too, up to thousands
of tokens. So a forward is padded to one of some shapes (`rayft.serving.paged_batch.Shape`), captured once for
each, and replayed as a CUDA graph. What a row beyond the requests computes goes to a page that no request
has. Decoding has few shapes, and they are captured when they first come; with prompts there are many, and
one is captured when it comes again.

Shapes: N tokens, T of requests' keys, H heads, G heads of keys, D head size.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from rayft.kernels.grouped_lora import Rows
from rayft.serving.engine import EngineLimits
from rayft.serving.packed_forward import causal
from rayft.serving.packed_row import Part, RowCache, running
from rayft.serving.paged_batch import Batch, Layout, Pages, Pool, Shape, power
from rayft.serving.slots import Slots

__all__ = ["PagedForward"]

MOST_GRAPHS = 256
"""Beyond, the one that was replayed longest ago goes."""
MOST_SEEN = 4096
"""Shapes that are remembered before they are captured."""
SHARED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
"""Before torch 2.12 they are taken as they come."""


@dataclass(frozen=True)
class _Captured:
    """A graph, what it reads and what it writes."""

    graph: Any
    batch: Batch
    rows: Rows | None
    """The graph reads their buffers."""
    logits: torch.Tensor
    """A view of what all graphs write to: the next replay of any takes its place."""


class PagedForward:
    """See `rayft.serving.packed_row.Forward`."""

    def __init__(self, model: Any, slots: Slots, limits: EngineLimits, *, graphs: bool) -> None:
        """Make the pool.

        Args:
            model: in 16 bits where it is on a GPU.
            slots: its adapters.
            limits: `cache_tokens` are the pool's.
            graphs: whether to replay forwards as CUDA graphs.
        """
        self._model, self._slots = model, slots
        self._pool = Pool(limits.cache_tokens)
        self.layers: set[int] = set()
        self._stream = torch.cuda.Stream() if model.device.type == "cuda" else None
        self._graphs: dict[Shape, _Captured] | None = {} if graphs else None
        self._seen: dict[Shape, None] = {}
        self._capturing = True
        self._memory: Any = None
        self._most_parts = power(limits.max_running)
        self._logits: torch.Tensor | None = None

    def fresh(self) -> Pages:
        """Give a request a place for its keys and values."""
        return Pages()

    def release(self, cache: RowCache) -> None:
        """Take the place back."""
        assert isinstance(cache, Pages)
        self._pool.release(cache)

    @torch.inference_mode()
    def logits(self, parts: Sequence[Part]) -> torch.Tensor:
        """Run the model: the logits after the last token of each complete part (parts × V)."""
        layout = self._layout(parts)
        if self._stream is None:
            return self._run(layout)
        with torch.cuda.stream(self._stream):
            found = self._run(layout) if self._graphs is None else self._by_graph(layout)
        # What follows reads them on the thread's own stream.
        self._stream.synchronize()
        return found

    def _layout(self, parts: Sequence[Part]) -> Layout:
        ids: list[int] = []
        q_ends, k_ends = [0], [0]
        positions, write, gather = [], [], []
        for part in parts:
            cache, new = part.row.cache, part.new
            assert isinstance(cache, Pages)
            first, length = cache.length, cache.length + new
            self._pool.grow(cache, length)
            ids += part.row.tokens[first:length]
            positions.append(np.arange(first, length))
            write.append(cache.places[first:length])
            gather.append(cache.places[:length])
            q_ends.append(q_ends[-1] + new)
            k_ends.append(k_ends[-1] + length)
        slots = [part.row.slot for part in parts]
        return Layout(
            ids=np.array(ids, np.int64),
            positions=np.concatenate(positions),
            write=np.concatenate(write),
            gather=np.concatenate(gather),
            q_ends=q_ends,
            k_ends=k_ends,
            slots=np.repeat(np.array(slots, np.int32), np.diff(q_ends)),
            owners=frozenset(slots),
            kept=[part.end - 1 for part in parts if part.complete],
            max_q=max(part.new for part in parts),
            max_k=max(len(places) for places in gather),
            past=any(part.row.cache.length for part in parts),
        )

    def _run(self, layout: Layout) -> torch.Tensor:
        batch = Batch(layout, self._pool, self._model.device)
        return self._model_logits(batch, self._rows(batch, layout, len(layout.owners)))

    def _rows(self, batch: Batch, layout: Layout, distinct: int) -> Rows | None:
        """Make the buffers of a batch's adapters; None where all tokens are the base's."""
        return self._slots.rows(batch.slots, distinct) if layout.adapters else None

    def _model_logits(self, batch: Batch, rows: Rows | None) -> torch.Tensor:
        self._slots.use(rows)
        running.attend, running.layers = partial(_attend_paged, batch), self.layers
        output = self._model(
            input_ids=batch.ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=batch.kept,
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def _by_graph(self, layout: Layout) -> torch.Tensor:
        """Replay the graph of a batch's shape, or make it, or wait for its shape to come again."""
        assert self._graphs is not None
        shape = Shape.of(layout)
        captured = self._graphs.pop(shape, None)
        if captured is None and not self._worth_capturing(shape):
            return self._run(layout)
        padded = layout.padded(shape)
        if captured is not None:
            captured.batch.fill(padded)
        elif (captured := self._try_to_capture(padded, shape)) is None:
            return self._run(layout)
        self._graphs[shape] = captured
        captured.graph.replay()
        return captured.logits[: len(layout.kept)]

    def _worth_capturing(self, shape: Shape) -> bool:
        """Tell whether a new shape is captured: decoding at once, one with prompts when it comes again."""
        if not self._capturing or shape.max_q == 1 or shape in self._seen:
            return self._capturing
        if len(self._seen) >= MOST_SEEN:
            del self._seen[next(iter(self._seen))]
        self._seen[shape] = None
        return False

    def _try_to_capture(self, padded: Layout, shape: Shape) -> _Captured | None:
        """Capture a batch's forward; after one that can't be, none is tried any more."""
        assert self._graphs is not None
        if len(self._graphs) >= MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        try:
            return self._capture(padded, shape.distinct)
        except RuntimeError as error:
            self._capturing = False
            logging.getLogger(__name__).warning(
                "no more forwards are captured as CUDA graphs, beside %d that were: %s",
                len(self._graphs),
                error,
            )
            return None

    def _capture(self, layout: Layout, distinct: int) -> _Captured:
        """Capture the forward of a batch; every key and value that it writes it will write again."""
        batch = Batch(layout, self._pool, self._model.device)
        rows = self._rows(batch, layout, distinct)
        found = self._model_logits(batch, rows)
        if self._logits is None:
            self._logits = found.new_empty(self._most_parts, found.shape[1])
        logits = self._logits[: len(found)]
        graph = torch.cuda.CUDAGraph()
        # Other threads load adapters meanwhile: what they do is none of the capture's.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            logits.copy_(self._model_logits(batch, rows))
        self._memory = self._memory or graph.pool()
        return _Captured(graph, batch, rows, logits)


def _attend_paged(
    batch: Batch,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend within each request of a batch; see `rayft.serving.packed_row.Attend`."""
    new = torch.cat((key, value)).permute(2, 0, 1, 3)
    pool = batch.pool.layer(layer, new)
    pool.index_copy_(0, batch.write, new)
    held = pool.index_select(0, batch.gather) if batch.gathers else new
    keys, values = held.unbind(1)
    return _attend(query[0].transpose(0, 1), keys, values, batch, scaling, window).unsqueeze(0)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend: query (N × H × D), keys and values (T × G × D)."""
    if query.is_cuda:
        left = -1 if window is None else window - 1
        shared = SHARED_HEADS if query.shape[1] != keys.shape[1] else {}
        found = varlen_attn(
            query, keys, values, batch.q_ends, batch.k_ends, batch.max_q, batch.max_k,
            scale=scaling, window_size=(left, 0), **shared,
        )  # fmt: skip
        assert isinstance(found, torch.Tensor)
        return found
    out = torch.empty_like(query)
    q_ends, k_ends = batch.q_ends.tolist(), batch.k_ends.tolist()
    for index in range(len(q_ends) - 1):
        here, there = slice(*q_ends[index : index + 2]), slice(*k_ends[index : index + 2])
        if here.start == here.stop:
            continue
        q, k, v = (one.transpose(0, 1)[None] for one in (query[here], keys[there], values[there]))
        out[here] = causal(q, k, v, scaling, window)[0].transpose(0, 1)
    return out

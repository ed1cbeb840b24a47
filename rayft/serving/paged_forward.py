"""The packed engine's forward on GPUs: all requests' keys and values lie in pages of one pool.

The packed tokens of a forward attend by PyTorch's variable-length flash attention: nothing is padded to the
longest, no mask between requests is made, and what overflows in one stays in it. Keys and values that are in
the pool are gathered before it.

Where each request reads one token, launches would take most of the time: such a forward is captured once for
each padded number of requests and of gathered tokens, and replayed as a CUDA graph. What a row beyond the
requests computes goes to a page that no request has.

Shapes: N tokens, T of requests' keys, H heads, G heads of keys, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from rayft.kernels.grouped_lora import DECODE
from rayft.serving.engine import EngineLimits
from rayft.serving.packed_forward import causal
from rayft.serving.packed_row import PAGE, Part, RowCache, pages, running
from rayft.serving.slots import Slots

__all__ = ["PagedForward"]

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, DECODE)
"""Requests that decoding is padded to."""
LEAST_GATHERED = 1024
"""Keys that decoding is padded to, or a power of 2 times it."""
MOST_GRAPHS = 96
SHARED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
"""Before torch 2.12 they are taken as they come."""


class Pages(RowCache):
    """Where one request's keys and values lie in the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[int] = []
        self.places = np.empty(0, np.int64)
        """Place in the pool of each token that there is a page for."""


class Pool:
    """Keys and values of all layers: for each (places × 2 × G × D), made when the layer first runs."""

    def __init__(self, tokens: int) -> None:
        # The first page is for rows that pad.
        self._free = list(range(-(-tokens // PAGE), 0, -1))
        self._places = (len(self._free) + 1) * PAGE
        self._layers: dict[int, torch.Tensor] = {}

    def grow(self, cache: Pages, length: int) -> None:
        """Give a request pages for so many tokens."""
        wanted = pages(length) // PAGE - len(cache.pages)
        if wanted > 0:
            new = [self._free.pop() for _ in range(wanted)]
            cache.pages += new
            fresh = (np.array(new, np.int64)[:, None] * PAGE + np.arange(PAGE)).ravel()
            cache.places = np.concatenate((cache.places, fresh))

    def release(self, cache: Pages) -> None:
        """Take a request's pages back."""
        self._free += cache.pages
        cache.pages, cache.places = [], np.empty(0, np.int64)

    def layer(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """Give a layer's pool; like (N × 2 × G × D)."""
        if index not in self._layers:
            self._layers[index] = like.new_zeros(self._places, *like.shape[1:])
        return self._layers[index]


@dataclass
class Layout:
    """A forward's numbers, on the host."""

    ids: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    write: np.ndarray[Any, Any]
    """Place of each token's key in the pool (N,)."""
    gather: np.ndarray[Any, Any]
    """Places of all keys that are attended to (T,)."""
    q_ends: list[int]
    """Where each request's tokens end, from 0 (requests + 1)."""
    k_ends: list[int]
    slots: list[int]
    kept: list[int]
    """Tokens whose logits are wanted."""
    max_q: int
    max_k: int
    past: bool
    """Whether there are keys from earlier forwards."""

    def padded(self, rows: int, gathered: int) -> Layout:
        """Add rows that read one token and have one key, on the page that is nobody's."""
        more = rows - len(self.ids)
        zeros = np.zeros(more, np.int64)
        used = len(self.gather) + more
        return Layout(
            ids=np.concatenate((self.ids, zeros)),
            positions=np.concatenate((self.positions, zeros)),
            write=np.concatenate((self.write, zeros)),
            gather=np.concatenate((self.gather, np.zeros(gathered - len(self.gather), np.int64))),
            q_ends=list(range(rows + 1)),
            k_ends=[*self.k_ends, *range(self.k_ends[-1] + 1, used + 1)],
            slots=[*self.slots, *[0] * more],
            kept=list(range(rows)),
            max_q=1,
            max_k=gathered,
            past=True,
        )


class Batch:
    """A layout on the device: two buffers, filled by two copies."""

    def __init__(self, layout: Layout, pool: Pool, device: torch.device) -> None:
        self.pool, self.max_q, self.max_k = pool, layout.max_q, layout.max_k
        self.gathers = layout.past
        longs, ints = self._packed(layout)
        self._longs, self._ints = longs.to(device), ints.to(device)
        n, kept, ends = len(layout.ids), len(layout.kept), len(layout.q_ends)
        self.ids, self.positions, self.write, self.kept, self.gather = self._longs.split(
            [n, n, n, kept, len(layout.gather) if layout.past else 0]
        )
        self.q_ends, self.k_ends = self._ints.split([ends, ends])

    def fill(self, layout: Layout) -> None:
        """Put another layout of the same sizes in."""
        longs, ints = self._packed(layout)
        self._longs.copy_(longs, non_blocking=True)
        self._ints.copy_(ints, non_blocking=True)

    def _packed(self, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        gather = layout.gather if layout.past else layout.gather[:0]
        longs = np.concatenate(
            (layout.ids, layout.positions, layout.write, np.array(layout.kept, np.int64), gather)
        )
        return torch.from_numpy(longs), torch.tensor([*layout.q_ends, *layout.k_ends], dtype=torch.int32)


@dataclass(frozen=True)
class _Captured:
    """A graph, what it reads and what it writes."""

    graph: Any
    batch: Batch
    logits: torch.Tensor


class PagedForward:
    """See `rayft.serving.packed_row.Forward`."""

    def __init__(self, model: Any, slots: Slots, limits: EngineLimits, *, graphs: bool) -> None:
        """Make the pool.

        Args:
            model: in 16 bits where it is on a GPU.
            slots: its adapters.
            limits: `cache_tokens` are the pool's.
            graphs: whether to replay decoding as CUDA graphs.
        """
        self._model, self._slots = model, slots
        self._pool = Pool(limits.cache_tokens)
        self.layers: set[int] = set()
        self._stream = torch.cuda.Stream() if model.device.type == "cuda" else None
        self._graphs: dict[tuple[int, int, bool], _Captured] | None = {} if graphs else None
        self._memory: Any = None

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
            if self._graphs is not None and layout.max_q == 1 and len(layout.ids) <= DECODE:
                found = self._replay(layout)
            else:
                found = self._run(layout)
        # What follows reads them on the thread's own stream.
        self._stream.synchronize()
        return found

    def _layout(self, parts: Sequence[Part]) -> Layout:
        ids: list[int] = []
        slots: list[int] = []
        q_ends, k_ends = [0], [0]
        positions, write, gather = [], [], []
        for part in parts:
            cache, new = part.row.cache, part.new
            assert isinstance(cache, Pages)
            first, length = cache.length, cache.length + new
            self._pool.grow(cache, length)
            ids += part.row.tokens[first:length]
            slots += [part.row.slot] * new
            positions.append(np.arange(first, length))
            write.append(cache.places[first:length])
            gather.append(cache.places[:length])
            q_ends.append(q_ends[-1] + new)
            k_ends.append(k_ends[-1] + length)
        return Layout(
            ids=np.array(ids, np.int64),
            positions=np.concatenate(positions),
            write=np.concatenate(write),
            gather=np.concatenate(gather),
            q_ends=q_ends,
            k_ends=k_ends,
            slots=slots,
            kept=[part.end - 1 for part in parts if part.complete],
            max_q=max(part.new for part in parts),
            max_k=max(len(places) for places in gather),
            past=any(part.row.cache.length for part in parts),
        )

    def _run(self, layout: Layout) -> torch.Tensor:
        self._slots.assign(layout.slots)
        return self._model_logits(Batch(layout, self._pool, self._model.device))

    def _model_logits(self, batch: Batch) -> torch.Tensor:
        running.attend, running.layers = partial(_attend_paged, batch), self.layers
        output = self._model(
            input_ids=batch.ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=batch.kept,
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def _replay(self, layout: Layout) -> torch.Tensor:
        assert self._graphs is not None
        n = len(layout.ids)
        rows = next(size for size in SIZES if size >= n)
        gathered = LEAST_GATHERED
        while gathered < len(layout.gather) + rows - n:
            gathered *= 2
        padded = layout.padded(rows, gathered)
        self._slots.stage(padded.slots)
        key = rows, gathered, self._slots.in_use
        captured = self._graphs.pop(key, None)
        if captured is None:
            if len(self._graphs) >= MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            captured = self._capture(padded)
        else:
            captured.batch.fill(padded)
        self._graphs[key] = captured
        captured.graph.replay()
        return captured.logits[:n]

    def _capture(self, layout: Layout) -> _Captured:
        """Capture the forward of a staged batch; every key and value that it writes it will write again."""
        batch = Batch(layout, self._pool, self._model.device)
        self._slots.prepare()
        self._model_logits(batch)
        graph = torch.cuda.CUDAGraph()
        # Other threads load adapters meanwhile: what they do is none of the capture's.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            self._slots.prepare()
            logits = self._model_logits(batch)
        self._memory = self._memory or graph.pool()
        return _Captured(graph, batch, logits)


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
        q, k, v = (one.transpose(0, 1)[None] for one in (query[here], keys[there], values[there]))
        out[here] = causal(q, k, v, scaling, window)[0].transpose(0, 1)
    return out

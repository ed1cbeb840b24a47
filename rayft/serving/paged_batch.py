"""What a forward over the pool reads: pages, a batch laid out on the host, the same on the device.

Shapes: N tokens, T keys that are attended to, G heads of keys, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rayft.kernels.grouped_lora import DECODE
from rayft.kernels.segment_lora import BASE_SLOT
from rayft.serving.packed_row import PAGE, RowCache, pages

__all__ = ["Batch", "Layout", "Pages", "Pool", "Shape", "power"]

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, DECODE)
"""Requests that decoding is padded to."""
LEAST_TOKENS = 64
"""Tokens that a forward with prompts is padded to a multiple of; above 1,024, an eighth at most is added."""
LEAST_GATHERED = 1024
"""Keys that a forward is padded to, or a power of 2 times it."""
LEAST_DISTINCT = 4
"""Different slots that a forward with prompts is made for, or a power of 2 times it."""


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


@dataclass(frozen=True)
class Shape:
    """All that the launches of a forward depend on: a graph serves the batches of one shape."""

    tokens: int
    parts: int
    max_q: int
    gathered: int
    """Keys; 0: none from earlier forwards, which decoding always has."""
    distinct: int
    """Different slots at most; 0: all tokens are the base's."""

    @classmethod
    def of(cls, layout: Layout) -> Shape:
        """Give the smallest one that a batch fits in."""
        n, parts = len(layout.ids), len(layout.q_ends) - 1
        if layout.max_q == 1 and n <= DECODE:
            tokens = parts = next(size for size in SIZES if size >= n)
            max_q, distinct = 1, tokens
        else:
            step = max(LEAST_TOKENS, power(n) // 16)
            # One token a request takes a way of its own in the kernel, which wants as many of both.
            tokens, parts, max_q = -(-n // step) * step, power(parts), power(max(layout.max_q, 2))
            distinct = min(power(max(LEAST_DISTINCT, len(layout.owners))), tokens)
        lone = min(tokens - n, parts - (len(layout.q_ends) - 1))
        gathered = 0
        if layout.past or max_q == 1:
            gathered = max(LEAST_GATHERED, power(len(layout.gather) + lone))
        return cls(tokens, parts, max_q, gathered, distinct if layout.adapters else 0)


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
    slots: np.ndarray[Any, Any]
    """Whose each token is (N,) int32."""
    owners: frozenset[int]
    """The slots that there are."""
    kept: list[int]
    """Tokens whose logits are wanted."""
    max_q: int
    max_k: int
    past: bool
    """Whether there are keys from earlier forwards."""

    @property
    def adapters(self) -> bool:
        """Whether a token has an adapter."""
        return self.owners != {BASE_SLOT}

    def padded(self, shape: Shape) -> Layout:
        """Fill a shape: requests of one token and one key on the page that is nobody's, or of none at all.

        Tokens beyond them belong to no request, and attention leaves their rows as they are.
        """
        more, empty = shape.tokens - len(self.ids), shape.parts - (len(self.q_ends) - 1)
        zeros, lone = np.zeros(more, np.int64), min(more, empty)
        ahead = [*range(1, lone + 1), *[lone] * (empty - lone)]
        return Layout(
            ids=np.concatenate((self.ids, zeros)),
            positions=np.concatenate((self.positions, zeros)),
            write=np.concatenate((self.write, zeros)),
            gather=np.concatenate(
                (self.gather, np.zeros(max(shape.gathered - len(self.gather), 0), np.int64))
            ),
            q_ends=[*self.q_ends, *(self.q_ends[-1] + one for one in ahead)],
            k_ends=[*self.k_ends, *(self.k_ends[-1] + one for one in ahead)],
            slots=np.concatenate((self.slots, zeros.astype(np.int32))),
            owners=self.owners,
            kept=[*self.kept, *[0] * (shape.parts - len(self.kept))],
            max_q=shape.max_q,
            max_k=shape.gathered or shape.max_q,
            past=shape.gathered > 0,
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
        # The slots first: kernels want them aligned.
        self.slots, self.q_ends, self.k_ends = self._ints.split([n, ends, ends])

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
        ints = np.concatenate((layout.slots, np.array([*layout.q_ends, *layout.k_ends], np.int32)))
        return torch.from_numpy(longs), torch.from_numpy(ints)


def power(number: int) -> int:
    """Round up to a power of 2."""
    return 1 << (number - 1).bit_length()

"""Buffers and launches of the grouped Triton kernels for a batch; see `rayft.kernels.grouped_lora`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton

from rayft.kernels.grouped_lora import FIELDS, SLICES, AdapterTable, Tuning, tile_bound
from rayft.kernels.grouped_lora_triton import describe, expand, order, shrink
from rayft.kernels.launch_triton import Launcher

__all__ = ["Plan"]

launch_order = Launcher(order, num_warps=4)
launch_describe = Launcher(describe, num_warps=4)


@lru_cache(maxsize=64)
def _launcher(kernel: Any, warps: int, stages: int, overlap: bool) -> Launcher:
    options = {"launch_pdl": True} if overlap else {}
    return Launcher(kernel, num_warps=warps, num_stages=stages, **options)


class Plan:
    """The buffers of a batch of N rows, and the launches over them."""

    def __init__(self, table: AdapterTable, n_rows: int, tuning: Tuning, distinct: int) -> None:
        self._table, self._n_rows, self._tuning = table, n_rows, tuning
        self._n_tiles = tile_bound(n_rows, distinct, tuning.tile)
        device, layers = table.entries.device, table.entries.shape[1]
        self._sorted = torch.zeros(n_rows, 4, dtype=torch.int32, device=device)
        self._rows = torch.zeros(self._n_tiles, tuning.tile, dtype=torch.int32, device=device)
        self._tiles = torch.zeros(layers, self._n_tiles, FIELDS, dtype=torch.int64, device=device)
        self._chunks = [tuning.chunk(n_rows, group.inputs, len(group.outputs)) for group in table.groups]
        self._parts = [
            -(-group.inputs // chunk) for group, chunk in zip(table.groups, self._chunks, strict=True)
        ]
        most = max(len(group.outputs) * n for group, n in zip(table.groups, self._parts, strict=True))
        assert most * n_rows * table.widest < 2**31, "more rows than the kernels can count"
        self.h = table.scratch(most * n_rows * table.widest).view(most, n_rows, table.widest)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without h, which all plans of a table share."""
        return sum(buffer.nbytes for buffer in (self._sorted, self._rows, self._tiles))

    def prepare(self, slots: torch.Tensor) -> None:
        """Sort the rows and look their factors up, in every layer."""
        n_rows, tile = self._n_rows, self._tuning.tile
        launch_order((-(-n_rows // 32), 1, 1), (slots, self._sorted), (n_rows, self._table.slots), (32, 256))
        launch_describe(
            (self._tiles.shape[0], 1, 1),
            (self._sorted, self._table.entries, self._tiles, self._rows),
            (n_rows, self._n_tiles),
            (FIELDS, tile, min(256, max(16, int(triton.next_power_of_2(n_rows))))),
        )

    def add(self, x: torch.Tensor, ys: Sequence[torch.Tensor], group: int, *, accumulate: bool) -> None:
        """Add the adapters of a group's linears to their outputs, or write them."""
        for what, matrix in (("x", x), *(("y", y) for y in ys)):
            assert matrix.stride(1) == 1, f"{what}: numbers of a row must be neighbours"
            assert matrix.dtype == self._table.dtype, f"{what} is not of the table's {self._table.dtype}"
        self._shrink(x, group)
        self._expand(ys, group, accumulate=accumulate)

    def _shrink(self, x: torch.Tensor, group: int) -> None:
        known, chunk, tuning = self._table.groups[group], self._chunks[group], self._tuning
        _launcher(shrink, tuning.shrink_warps, tuning.stages, tuning.overlap)(
            (len(known.outputs) * self._parts[group], self._n_tiles, 1),
            (x, *self._places(group)),
            (self._n_rows, known.inputs, x.stride(0), self._n_tiles),
            (*self._shape(group), tuning.inputs, chunk, tuning.overlap),
        )

    def _expand(self, ys: Sequence[torch.Tensor], group: int, *, accumulate: bool) -> None:
        known, tuning, parts = self._table.groups[group], self._tuning, self._parts[group]
        # Up to the number that the kernel takes; it doesn't touch what is beyond the group's.
        three = [*ys, *[ys[0]] * (SLICES - len(ys))]
        padded = 1 << (parts - 1).bit_length()
        _launcher(expand, tuning.expand_warps, 1, tuning.overlap)(
            (sum(-(-size // tuning.outputs) for size in known.outputs.values()), self._n_tiles, 1),
            (*three, *self._places(group)),
            (self._n_rows, *(y.shape[1] for y in three), *(y.stride(0) for y in three), self._n_tiles),
            (*self._shape(group), tuning.outputs, tuning.ranks, parts, padded, accumulate, tuning.overlap),
        )

    def _places(self, group: int) -> tuple[torch.Tensor, ...]:
        return self._tiles[self._table.first[group] :], self._rows, self.h

    def _shape(self, group: int) -> tuple[int, ...]:
        return FIELDS, self._table.widest, len(self._table.groups[group].outputs), self._tuning.tile

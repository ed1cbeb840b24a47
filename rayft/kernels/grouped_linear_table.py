"""The table that tells the kernels of `rayft.kernels.grouped_linear` where everything is.

Terms are divided into *chunks* of at most 32 or 64 ranks, and the rows into *strips* of 16 or 32 rows that
have the same chunks. For q and db, the rows of a chunk are divided into *parts*. The kernels read the table
in the device's memory, so none is compiled for a rank, a scale, a number of rows or an address.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, chain, groupby
from typing import TYPE_CHECKING

import torch

from rayft.kernels.launch_triton import ALIGNED

if TYPE_CHECKING:
    from rayft.kernels.grouped_linear import Term

__all__ = ["CHUNK", "PART", "STRIP", "TRAINS_A", "TRAINS_B", "Table"]

CHUNK = 16
"""Numbers of a chunk: addresses of B, A and columns (0 for the one that it doesn't have), rank, row stride of
B, bits of the scale, first row, rows, place of q, flags, places in the sums of q and of db, number of parts,
places of db and of da among the gradients, place of h."""
STRIP = 5
"""Numbers of a strip: first row, rows, first chunk, number of chunks, whether each chunk selects distinct
columns."""
PART = 4
"""Numbers of a part: chunk, first row, rows, index among the parts of the chunk."""
TRAINS_B, TRAINS_A = 1, 2
"""Flags of a chunk."""

LEAST = 256
"""The fewest rows of a part: with fewer, the parts of db have about as many bytes as g."""
LONG = 4096
"""Rows of a term from which torch's product computes da: it also splits the rows among programs."""


class Table:
    """Where the terms of a layer are, on the device, and how their work is divided among programs."""

    def __init__(
        self, terms: Sequence[Term], n_rows: int, inputs: int, outputs: int, like: torch.Tensor
    ) -> None:
        """Write the table.

        Args:
            terms: sorted by their rows.
            n_rows: N.
            inputs: I.
            outputs: O.
            like: a tensor of x's dtype on its device.
        """
        self.n_rows, self.inputs, self.outputs, self.dtype = n_rows, inputs, outputs, like.dtype
        self.ranks = 32 if max((term.b.shape[1] for term in terms), default=0) <= 32 else 64
        """The most ranks of a chunk."""
        self.strip = 16 if n_rows <= 4096 else 32
        """Rows of a strip."""
        # As in low_rank_linear_triton: large tiles where there is enough of g to fill the device.
        big = n_rows * outputs >= 2**24
        self.tile_o = 256 if big else 128
        """Outputs that are multiplied at once for q and db."""
        self.tiles = -(-outputs // self.tile_o)
        rows = sum((term.rows.stop - term.rows.start) * -(-term.b.shape[1] // self.ranks) for term in terms)
        self._part = max(LEAST, -(-rows // max(1, (132 if big else 264) // self.tiles)))
        self.h_numbers = self.frozen_numbers = self.q_numbers = self.sums = self.grads = 0
        """Sizes of the buffers: h where B trains, h where it doesn't, q, the sums in float32, gradients."""
        self.views: list[tuple[int, tuple[int, ...]]] = []
        """Place among the gradients, and shape, of each tensor that trains."""
        self.long: list[tuple[slice, int, int, int]] = []
        """Chunks whose da torch computes: rows, place of q, rank, place of da."""
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Factors that are not contiguous or aligned, and the copies of them that the kernels read."""
        self._strips: list[list[int]] = []
        self._chunks: list[list[int]] = []
        self._parts: list[list[int]] = []
        self._with_b: list[int] = []
        self._with_a: list[int] = []
        self.adds = 2 * self._fill(terms) < n_rows
        """Whether most rows select inputs, so that it is best to add to grad_x."""
        self.strips, self.parts = len(self._strips), len(self._parts)
        self.with_b, self.with_a = len(self._with_b), len(self._with_a)
        self.several = any(strip[3] > 1 for strip in self._strips)
        """Whether a strip has more than one chunk."""
        sections = [[*chain(*rows)] for rows in (self._strips, self._chunks, self._parts)]
        sections += [self._with_b, self._with_a]
        ends = list(accumulate(map(len, sections)))
        self.chunks_at, self.parts_at, self.b_at, self.a_at = ends[:-1]
        self.numbers = torch.tensor([*chain(*sections)], dtype=torch.int64).to(like.device)
        """Strips, chunks, parts, the numbers of chunks whose B trains, and of those whose A trains."""

    def _fill(self, terms: Sequence[Term]) -> int:
        """Divide all terms and rows, and return the number of rows of which q A has numbers everywhere."""
        done = dense = 0
        for (first, end), found in groupby(terms, key=lambda term: (term.rows.start, term.rows.stop)):
            same, before = list(found), len(self._chunks)
            for term in same:
                self._add(term)
            scattered = all(term.a is None and term.distinct for term in same)
            self._divide(done, first, 0, 0, scattered=True)
            self._divide(first, end, before, len(self._chunks) - before, scattered=scattered)
            done, dense = end, dense + (0 if scattered else end - first)
        assert done <= self.n_rows, f"terms of {done} rows for {self.n_rows} tokens"
        self._divide(done, self.n_rows, 0, 0, scattered=True)
        return dense

    def _add(self, term: Term) -> None:
        """Write the chunks and parts of a term."""
        b, a = self._steady(term.b), None if term.a is None else self._steady(term.a)
        columns = None if term.columns is None else self._steady(term.columns)
        assert b.shape[0] == self.outputs, f"B is not of a layer with {self.outputs} outputs"
        assert a is None or a.shape[1] == self.inputs, f"A is not of a layer with {self.inputs} inputs"
        assert all(factor is None or factor.dtype == self.dtype for factor in (b, a)), f"not {self.dtype}"
        rank, first, rows = b.shape[1], term.rows.start, term.rows.stop - term.rows.start
        trains_b, trains_a = term.b.requires_grad, term.a is not None and term.a.requires_grad
        db_at = self._gradient(term.b) if trains_b else 0
        da_at = self._gradient(term.a) if trains_a and term.a is not None else 0
        part_rows = -(-rows // max(1, -(-rows // self._part)))
        part_rows = -(-part_rows // 64) * 64
        scale = int(struct.unpack("<i", struct.pack("<f", term.scale))[0])
        long = trains_a and rows >= LONG
        for start in range(0, rank, self.ranks):
            mine = min(self.ranks, rank - start)
            numbers = rows * (-(-mine // 8) * 8)
            parts = -(-rows // part_rows) if rows else 0
            number = len(self._chunks)
            h_at = self.h_numbers if trains_b else self.frozen_numbers
            self._chunks.append([
                b.data_ptr() + start * b.element_size(),
                0 if a is None else a.data_ptr() + start * self.inputs * a.element_size(),
                0 if columns is None else columns.data_ptr() + start * columns.element_size(),
                mine, rank, scale, first, rows, self.q_numbers,
                TRAINS_B * trains_b + TRAINS_A * trains_a,
                self.sums, self.sums + self.tiles * numbers, parts,
                db_at + start, da_at + start * self.inputs, h_at,
            ])  # fmt: skip
            for part in range(parts):
                begin = part * part_rows
                self._parts.append([number, first + begin, min(part_rows, rows - begin), part])
            if trains_b:
                self._with_b.append(number)
            if long:
                self.long.append((term.rows, self.q_numbers, mine, da_at + start * self.inputs))
            elif trains_a:
                self._with_a.append(number)
            self.q_numbers += numbers
            self.h_numbers += numbers if trains_b else 0
            self.frozen_numbers += 0 if trains_b else numbers
            self.sums += self.tiles * numbers + (-(-parts * mine * self.outputs // 8) * 8 if trains_b else 0)

    def _divide(self, first: int, end: int, chunk: int, count: int, *, scattered: bool) -> None:
        """Write the strips of some rows."""
        for begin in range(first, end, self.strip):
            self._strips.append([begin, min(self.strip, end - begin), chunk, count, int(scattered)])

    def _gradient(self, parameter: torch.Tensor) -> int:
        """Return the place of a tensor's gradient among all of them."""
        place = self.grads
        self.views.append((place, tuple(parameter.shape)))
        self.grads += -(-parameter.numel() // 8) * 8
        return place

    def _steady(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that the kernels can read at its address, or the memory of a copy (`refresh`)."""
        tensor = tensor.detach()
        # Columns are read one by one.
        if tensor.is_contiguous() and (tensor.data_ptr() % ALIGNED == 0 or not tensor.is_floating_point()):
            return tensor
        self.copies.append((torch.empty_like(tensor, memory_format=torch.contiguous_format), tensor))
        return self.copies[-1][0]

    def refresh(self) -> None:
        """Copy what the kernels can't read where it is."""
        for copy, tensor in self.copies:
            copy.copy_(tensor)

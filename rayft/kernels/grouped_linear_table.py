"""The table that tells the kernels of `rayft.kernels.grouped_linear` where everything is.

Terms are divided into *chunks* of at most 32 or 64 ranks, and the rows into *strips* of 16 to 64 rows that
have the same chunks. For q and db, the rows of a chunk are divided into *parts*. The kernels read the table
in the device's memory, so none is compiled for a rank, a scale, a number of rows or an address.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rayft.kernels.launch_triton import ALIGNED
from rayft.numerics import moved

if TYPE_CHECKING:
    from rayft.kernels.grouped_linear import Term

__all__ = ["CHUNK", "PART", "STRIP", "TRAINS_A", "TRAINS_B", "Division", "Table"]

CHUNK = 16
"""Numbers of a chunk: addresses of B, A and columns (0 for the one that it doesn't have), rank, row stride of
B, bits of the scale, first row, rows, place of q, flags, places in the sums of q and of db, number of parts,
places of db and of da among the gradients, place of h."""
STRIP = 5 + CHUNK
"""Numbers of a strip: first row, rows, first chunk, number of chunks, whether each chunk selects distinct
columns; then those of the first chunk, because a read that waits for another takes as long again."""
PART = 3 + CHUNK
"""Numbers of a part: first row, rows, index among the parts of the chunk; then those of the chunk."""
TRAINS_B, TRAINS_A = 1, 2
"""Flags of a chunk."""
FACTORS = 3
"""Addresses at the begin of a chunk: those of B, A and the columns."""
COLUMN = 8
"""Bytes of a column's number."""

LEAST = 256
"""The fewest rows of a part: with fewer, the parts of db have about as many bytes as g."""
LONG = 4096
"""Rows of a term from which torch's product computes da: it also splits the rows among programs."""


class Shape(NamedTuple):
    """What the division of a term's work depends on."""

    first: int
    """Its first row."""
    rows: int
    rank: int
    scale: float
    dense: bool
    """Whether it has A, and no columns."""
    distinct: bool
    """As of the term."""
    trains_b: bool
    trains_a: bool

    @classmethod
    def of(cls, term: Term) -> Shape:
        """Describe a term."""
        rows, a = term.rows, term.a
        trains_a = a is not None and a.requires_grad
        return cls(
            rows.start, rows.stop - rows.start, term.b.shape[1], term.scale, a is not None, term.distinct,
            term.b.requires_grad, trains_a,
        )  # fmt: skip


class Division:
    """How the work of a layer's terms is divided among programs. Layers of equal shapes share one."""

    def __init__(self, terms: Sequence[Shape], n_rows: int, inputs: int, outputs: int, itemsize: int) -> None:
        """Divide the work.

        Args:
            terms: sorted by their rows.
            n_rows: N.
            inputs: I.
            outputs: O.
            itemsize: bytes of a number of x.
        """
        self.n_rows, self.inputs, self.outputs, self._itemsize = n_rows, inputs, outputs, itemsize
        self.ranks = 32 if max((term.rank for term in terms), default=0) <= 32 else 64
        """The most ranks of a chunk."""
        self.strip = 16 if n_rows <= 4096 else 32 if n_rows < 8192 else 64
        """Rows of a strip."""
        # As in low_rank_linear_triton: large tiles where there is enough of g to fill the device.
        big = n_rows * outputs >= 2**24
        self.tile_o = 256 if big else 128
        """Outputs that are multiplied at once for q and db."""
        self.tiles = -(-outputs // self.tile_o)
        self.tile_a = 32 if inputs < 1024 else 64
        """Inputs that are multiplied at once for da."""
        self.tiles_a = -(-inputs // self.tile_a)
        rows = sum(term.rows * -(-term.rank // self.ranks) for term in terms)
        self._part = max(LEAST, -(-rows // max(1, (132 if big else 264) // self.tiles)))
        self.h_numbers = self.frozen_numbers = self.q_numbers = self.sums = self.grads = 0
        """Sizes of the buffers: h where B trains, h where it doesn't, q, the sums in float32, gradients."""
        self.views: list[tuple[int, tuple[int, int]]] = []
        """Place among the gradients, and shape, of each tensor that trains."""
        self.long: list[tuple[slice, int, int, int]] = []
        """Chunks whose da torch computes: rows, place of q, rank, place of da."""
        self._strips: list[npt.NDArray[np.int64]] = []
        self._chunks: list[list[int]] = []
        self._parts: list[list[int]] = []
        """Of each part: number of its chunk, first row, rows, index."""
        self._with_b: list[int] = []
        self._with_a: list[int] = []
        owners: list[int] = []
        self.adds = 2 * self._fill(terms, owners) < n_rows
        """Whether most rows select inputs, so that it is best to add to grad_x."""
        strips = np.concatenate(self._strips)
        self.strips, self.parts = len(strips), len(self._parts)
        self.with_b, self.with_a = len(self._with_b), len(self._with_a)
        self.several = bool((strips[:, 3] > 1).any())
        """Whether a strip has more than one chunk."""
        self._write(strips, [*owners, len(terms)])

    def _write(self, strips: npt.NDArray[np.int64], owners: Sequence[int]) -> None:
        """Write the table's sections. Each row of one ends with the numbers of a chunk.

        Args:
            strips: the strips, without their first chunks.
            owners: the term of each chunk, and the number of terms for a chunk of zeros, which is the last.
        """
        chunks = np.array([*self._chunks, [0] * CHUNK], dtype=np.int64)
        parts = np.array(self._parts, dtype=np.int64).reshape(-1, 1 + PART - CHUNK)
        sections = [(strips, np.where(strips[:, 3] > 0, strips[:, 2], -1)), (parts[:, 1:], parts[:, 0])]
        for numbers in (range(len(self._chunks)), self._with_b, self._with_a):
            sections.append((np.empty((len(numbers), 0), np.int64), np.array(numbers, dtype=np.int64)))
        rows = [np.column_stack((head, chunks[numbers])) for head, numbers in sections]
        begins = [*accumulate((one.size for one in rows), initial=0)]
        _, self.parts_at, self.chunks_at, self.b_at, self.a_at, _ = begins
        self._numbers = np.concatenate([one.ravel() for one in rows])
        """All numbers of the table; for addresses, what is added to that of the factor."""
        ends = [
            begin + one.shape[1] * np.arange(1, len(one) + 1)
            for begin, one in zip(begins[:-1], rows, strict=True)
        ]
        of, factors = np.concatenate([numbers for _, numbers in sections]), np.arange(FACTORS)
        self._places = (np.concatenate(ends)[:, None] - CHUNK + factors).ravel()
        self._factors = (FACTORS * np.array(owners)[of][:, None] + factors).ravel()

    def numbers(self, addresses: Sequence[int]) -> np.ndarray:
        """Return all numbers of the table: (numbers,), int64.

        Args:
            addresses: those of B, A and the columns of each term; 0 for what a term doesn't have.
        """
        found = self._numbers.copy()
        found[self._places] += np.array([*addresses, *[0] * FACTORS], dtype=np.int64)[self._factors]
        return found

    def _fill(self, terms: Sequence[Shape], owners: list[int]) -> int:
        """Divide all terms and rows, and return the number of rows of which q A has numbers everywhere."""
        done = dense = 0
        for (first, count), found in groupby(enumerate(terms), key=lambda one: one[1][:2]):
            same, before = list(found), len(self._chunks)
            for number, term in same:
                self._add(term)
                owners += [number] * (len(self._chunks) - len(owners))
            scattered = all(not term.dense and term.distinct for _, term in same)
            self._divide(done, first, 0, 0, scattered=True)
            self._divide(first, first + count, before, len(self._chunks) - before, scattered=scattered)
            done, dense = first + count, dense + (0 if scattered else count)
        assert done <= self.n_rows, f"terms of {done} rows for {self.n_rows} tokens"
        self._divide(done, self.n_rows, 0, 0, scattered=True)
        return dense

    def _add(self, term: Shape) -> None:
        """Write the chunks and parts of a term."""
        first, rows, rank, trains_b, trains_a = term.first, term.rows, term.rank, term.trains_b, term.trains_a
        db_at = self._gradient(self.outputs, rank) if trains_b else 0
        da_at = self._gradient(rank, self.inputs) if trains_a else 0
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
                start * self._itemsize,
                start * self.inputs * self._itemsize if term.dense else 0,
                0 if term.dense else start * COLUMN,
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
                span = slice(first, first + rows)
                self.long.append((span, self.q_numbers, mine, da_at + start * self.inputs))
            elif trains_a:
                self._with_a.append(number)
            self.q_numbers += numbers
            self.h_numbers += numbers if trains_b else 0
            self.frozen_numbers += 0 if trains_b else numbers
            self.sums += self.tiles * numbers + (-(-parts * mine * self.outputs // 8) * 8 if trains_b else 0)

    def _divide(self, first: int, end: int, chunk: int, count: int, *, scattered: bool) -> None:
        """Write the strips of some rows."""
        begins = np.arange(first, end, self.strip)
        rows = np.minimum(self.strip, end - begins)
        same = np.broadcast_to((chunk, count, int(scattered)), (len(begins), 3))
        self._strips.append(np.column_stack((begins, rows, same)))

    def _gradient(self, rows: int, columns: int) -> int:
        """Return the place of a tensor's gradient among all of them."""
        place = self.grads
        self.views.append((place, (rows, columns)))
        self.grads += -(-rows * columns // 8) * 8
        return place


@lru_cache(maxsize=64)
def divide(terms: tuple[Shape, ...], n_rows: int, inputs: int, outputs: int, itemsize: int) -> Division:
    """Return the division of some terms' work (see `Division`), the same object for the same arguments."""
    return Division(terms, n_rows, inputs, outputs, itemsize)


class Table:
    """Where the terms of a layer are, on the device, and how their work is divided."""

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
        self._dtype = like.dtype
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Factors that are not contiguous or aligned, and the copies of them that the kernels read."""
        shapes = tuple(map(Shape.of, terms))
        self.division = divide(shapes, n_rows, inputs, outputs, like.element_size())
        """How the work is divided."""
        addresses = [address for term in terms for address in self._addresses(term, inputs, outputs)]
        self.numbers = moved(torch.from_numpy(self.division.numbers(addresses)), like.device)
        """Strips, parts, chunks, chunks whose B trains, and those whose A trains."""

    @cached_property
    def ended(self) -> torch.Tensor:
        """How many of the programs that compute da of a chunk and a tile of inputs have ended.

        The last one sets it back to 0, so launches that use the same table must not overlap. Only a backward
        pass needs it.
        """
        count = self.division.with_a * self.division.tiles_a
        return torch.zeros(count, device=self.numbers.device, dtype=torch.int32)

    def refresh(self) -> None:
        """Copy what the kernels can't read where it is."""
        for copy, tensor in self._copies:
            copy.copy_(tensor)

    def _addresses(self, term: Term, inputs: int, outputs: int) -> tuple[int, int, int]:
        """Return the addresses of B, A and the columns; 0 for what the term doesn't have."""
        assert term.b.shape[0] == outputs, f"B is not of a layer with {outputs} outputs"
        assert term.a is None or term.a.shape[1] == inputs, f"A is not of a layer with {inputs} inputs"
        b, a, columns = (
            0 if factor is None else self._steady(factor) for factor in (term.b, term.a, term.columns)
        )
        return b, a, columns

    def _steady(self, tensor: torch.Tensor) -> int:
        """Return where the kernels can read a tensor: where it is, or in a copy (`refresh`)."""
        # Columns are read one by one.
        floating = tensor.is_floating_point()
        assert not floating or tensor.dtype == self._dtype, f"not {self._dtype}"
        address = tensor.data_ptr()
        if tensor.is_contiguous() and (address % ALIGNED == 0 or not floating):
            return address
        copy = torch.empty_like(tensor, memory_format=torch.contiguous_format, requires_grad=False)
        self._copies.append((copy, tensor.detach()))
        return copy.data_ptr()

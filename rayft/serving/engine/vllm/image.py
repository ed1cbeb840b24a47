"""The bytes of an adapter as they lie in a worker's memory, so that loading them is copying them.

An image begins with the entries that the kernels read (`AdapterTable.entries`), one for each linear layer of
the worker, whose addresses count from the image's first byte. The matrices follow: for each layer B, whose
rows the kernels want in whole units, then A or the columns. `locate` makes the addresses those of the place
where the image is put.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Protocol

import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError
from rayft.kernels.grouped_lora import ADDRESSES, FIELDS, UNIT, WIDEST, entry
from rayft.kernels.segment_lora import SlotFactors
from rayft.serving.engine.api import slot_factors
from rayft.serving.engine.vllm.arena import aligned
from rayft.serving.engine.vllm.shard import Part, Parts, shard

__all__ = ["PIECE", "Bytes", "Image", "entries_in", "factors_of", "locate"]

PIECE = 8 * 2**20
"""Bytes that are copied at once. What a step copies to the device may have to wait for as many."""
WORD = 8
"""Pieces of an image begin at multiples of so many bytes, the size of its largest numbers."""


class Bytes(Protocol):
    """The bytes of an image, wherever they are."""

    nbytes: int
    """Their number."""

    def read(self, memory: torch.Tensor, begin: int) -> int:
        """Fill memory (bytes, uint8, on the CPU) with what begins at a byte; return the number of bytes.

        It may be less than the memory holds. The next piece begins behind it.
        """


@dataclass(frozen=True)
class _Matrix:
    """A matrix of an image, whose rows are padded with zeros."""

    begin: int
    numbers: torch.Tensor
    width: int
    """Numbers in a row, including the padding."""
    dtype: torch.dtype

    @property
    def row(self) -> int:
        """Size of a row in bytes."""
        return self.width * self.dtype.itemsize

    def write(self, memory: torch.Tensor, first: int, rows: int) -> None:
        """Write some rows to the first bytes of memory."""
        target = _view(memory, rows, self.width, self.dtype)
        source, used = self.numbers[first : first + rows], self.numbers.shape[1]
        target[:, :used].copy_(source)
        if used < self.width:
            target[:, used:] = 0


class Image:
    """The image of an adapter for one worker; its matrices are converted when they are read."""

    def __init__(self, factors: Mapping[str, SlotFactors], parts: Parts, dtype: torch.dtype) -> None:
        """Lay the matrices out.

        Args:
            factors: layer of the model's files → its factors, on the CPU.
            parts: what the worker has.
            dtype: of A and B in the image.

        Raises:
            ArtifactError: if the model has no such layer, a shape differs from the layer's, or a rank is
                larger than the kernels' largest.
        """
        known = {part.name: part for part in parts}
        mine: dict[str, SlotFactors] = {}
        for name, whole in factors.items():
            if name not in known:
                raise ArtifactError(
                    f"vLLM's model has no linear layer {name} that can have an adapter; train the adapter on "
                    "other layers, or serve it with engine: cpu"
                )
            _check(whole, known[name])
            here = shard(whole, known[name])
            if here is not None and here.b.shape[1]:
                mine[name] = here
        self._matrices: list[_Matrix] = []
        self.nbytes = 0
        entries = torch.zeros(len(parts), FIELDS, dtype=torch.int64)
        self._put(entries, FIELDS, torch.int64)
        rows = [self._add(mine[part.name], dtype) if part.name in mine else [0] * FIELDS for part in parts]
        entries.copy_(torch.tensor(rows, dtype=torch.int64).view(-1, FIELDS))
        self._begins = [matrix.begin for matrix in self._matrices]

    def read(self, memory: torch.Tensor, begin: int) -> int:
        """See `Bytes.read`. Memory has whole words, and room for all entries and for 8 rows of any matrix."""
        end = begin
        for matrix in self._matrices[bisect_right(self._begins, begin) - 1 :]:
            place, count = max(begin, matrix.begin), matrix.numbers.shape[0]
            # The bytes between two matrices may be any.
            end = min(place, begin + len(memory))
            first = min(-(-(place - matrix.begin) // matrix.row), count)
            fit = max(0, len(memory) - (place - begin)) // matrix.row
            # What follows has to begin at a whole word.
            rows = min(count - first, fit - fit % (WORD // gcd(WORD, matrix.row)))
            if rows:
                matrix.write(memory[place - begin :], first, rows)
                end = place + rows * matrix.row
            if first + rows < count:
                break
        assert end > begin, "memory is too small for any rows"
        return _words(end) - begin

    def _add(self, factors: SlotFactors, dtype: torch.dtype) -> list[int]:
        """Add the matrices of a layer; return its entry."""
        rank = factors.b.shape[1]
        stride = -(-rank // UNIT) * UNIT
        b, a, columns = self._put(factors.b, stride, dtype), 0, 0
        if factors.columns is not None:
            columns = self._put(factors.columns[None, :], rank, torch.int64)
        else:
            assert factors.a is not None
            a = self._put(factors.a, factors.a.shape[1], dtype)
        return entry(a=a, b=b, columns=columns, rank=rank, stride=stride, scale=factors.scale)

    def _put(self, numbers: torch.Tensor, width: int, dtype: torch.dtype) -> int:
        matrix = _Matrix(aligned(self.nbytes), numbers, width, dtype)
        self._matrices.append(matrix)
        self.nbytes = matrix.begin + _words(numbers.shape[0] * matrix.row)
        return matrix.begin


def factors_of(artifact: AdapterArtifact) -> dict[str, SlotFactors]:
    """Return what the kernels use of each layer of an adapter."""
    return {name: slot_factors(layer) for name, layer in artifact.modules.items()}


def entries_in(memory: torch.Tensor, layers: int) -> torch.Tensor:
    """View the entries (layers × `FIELDS`, int64) with which the image of a worker begins."""
    return _view(memory, layers, FIELDS, torch.int64)


def locate(entries: torch.Tensor, address: int) -> None:
    """Make the addresses in an image's entries those of an image whose first byte has an address."""
    addresses = entries[:, ADDRESSES]
    addresses += (addresses != 0) * address


def _words(nbytes: int) -> int:
    """Round a number of bytes up to whole words."""
    return -(-nbytes // WORD) * WORD


def _view(memory: torch.Tensor, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """View the first bytes of memory as a matrix."""
    return memory[: rows * width * dtype.itemsize].view(dtype).view(rows, width)


def _check(factors: SlotFactors, part: Part) -> None:
    """Refuse factors that don't fit a layer.

    Raises:
        ArtifactError: if their shapes differ from the layer's.
    """
    outputs, inputs = part.shape
    fits = factors.a is None or factors.a.shape[1] == inputs
    if factors.columns is not None and len(factors.columns):
        fits = int(factors.columns.min()) >= 0 and int(factors.columns.max()) < inputs
    if factors.b.shape[0] != outputs or not fits:
        raise ArtifactError(
            f"{part.name} is {outputs}x{inputs} in vLLM's model, and the adapter's factors are not; use it "
            "with its own base"
        )
    if factors.b.shape[1] > WIDEST:
        raise ArtifactError(
            f"{part.name} has rank {factors.b.shape[1]}, but GPUs serve ranks up to {WIDEST}; reduce it by "
            "`rayft squeeze`"
        )

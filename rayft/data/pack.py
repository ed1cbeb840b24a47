"""Pack several examples into one row, so that no example attends to another.

    input_ids      a a a b b b b 0        attention   a · · b · · ·      token i sees token j where
    position_ids   0 1 2 0 1 2 3 0                    a a · b b · ·      segment_i = segment_j and
    segments       0 0 0 1 1 1 1 2                    a a a b b b ·      j ≤ i; padding is a segment
    offsets        0 3 7 8

The loss of a row is therefore the sum of the losses of its examples. Each text or image to classify has a row
of its own.

Shapes: B rows, T tokens, N learnt tokens, C channels, H × W pixels.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from rayft.data.pixels import EncodedImage
from rayft.data.template import IGNORED, Encoded
from rayft.data.texts import Gathered, gather, lengths_of
from rayft.errors import DataError
from rayft.numerics import moved

__all__ = [
    "AnyBatch",
    "AnyEncoded",
    "Batch",
    "ClassBatch",
    "ImageBatch",
    "PackedRow",
    "Row",
    "Rows",
    "collate",
    "collate_classification",
    "collate_images",
    "collate_rows",
    "padded",
    "rows_of",
]

AnyEncoded = Encoded | EncodedImage
"""An encoded example."""

NO_ROW = 2**62
"""Greater than the index of any row."""

MULTIPLE = 8
"""Batches of several rows are padded to a multiple of this, which tensor cores need."""


@dataclass(frozen=True)
class PackedRow:
    """Examples that share a row, in their order."""

    examples: tuple[Encoded, ...]

    def __len__(self) -> int:
        return sum(map(len, self.examples))


@dataclass(frozen=True)
class Batch:
    """Rows as tensors for a causal language model."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    position_ids: torch.Tensor
    """(B, T) int64, starting at 0 in each example."""
    offsets: torch.Tensor
    """(S + 1,) int32: where each segment begins in the B·T tokens, and B·T. A segment is an example, or the
    padding of a row; each token attends to its own segment only, up to itself."""
    completion_index: torch.Tensor
    """(N,) int64: positions in B·T whose next token is learnt."""
    targets: torch.Tensor
    """(N,) int64: those next tokens."""

    def to(self, device: torch.device | str) -> Batch:
        """Move to a device."""
        return Batch(*(moved(getattr(self, field.name), device) for field in fields(self)))


@dataclass(frozen=True)
class ClassBatch:
    """Rows as tensors for a sequence classifier."""

    input_ids: torch.Tensor
    """(B, T) int64, padded on the right."""
    attention_mask: torch.Tensor
    """(B, T) int64, 0 on padding."""
    labels: torch.Tensor
    """(B,) int64."""

    def to(self, device: torch.device | str) -> ClassBatch:
        """Move to a device."""
        return ClassBatch(*(moved(getattr(self, field.name), device) for field in fields(self)))


@dataclass(frozen=True)
class ImageBatch:
    """Images as tensors for an image classifier."""

    pixel_values: torch.Tensor
    """(B, C, H, W) float32."""
    labels: torch.Tensor
    """(B,) int64."""

    @property
    def targets(self) -> torch.Tensor:
        """(B,) int64: the classes, which are what is learnt."""
        return self.labels

    @property
    def input_ids(self) -> torch.Tensor:
        """(B,): one element for each image. Throughput counts elements: tokens of texts, and images."""
        return self.labels

    def to(self, device: torch.device | str) -> ImageBatch:
        """Move to a device."""
        return ImageBatch(*(moved(getattr(self, field.name), device) for field in fields(self)))


Row = PackedRow | EncodedImage
"""A training row: texts that share it, or one image."""

AnyBatch = Batch | ClassBatch | ImageBatch


class Rows(Gathered[Row]):
    """The rows of examples, each made when it is asked for."""

    def __init__(self, encoded: Sequence[AnyEncoded], members: Sequence[Sequence[int]]) -> None:
        """Keep which examples each row has.

        Args:
            encoded: examples of one kind.
            members: for each row, the indices of its examples in `encoded`.
        """
        self._encoded = encoded
        # Two arrays: a million lists would take ten times their memory.
        self._members = np.fromiter((index for row in members for index in row), np.int32)
        self._ends = np.cumsum(np.fromiter(map(len, members), np.int64, len(members)))

    def __len__(self) -> int:
        return len(self._ends)

    def gather(self, indices: Sequence[int]) -> list[Row]:
        """Return some rows."""
        places = [range(self._ends[row - 1] if row else 0, self._ends[row]) for row in indices]
        found = iter(gather(self._encoded, [int(self._members[place]) for row in places for place in row]))
        return [self._row([*islice(found, len(row))]) for row in places]

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each row: (rows,)."""
        starts = np.concatenate(([0], self._ends[:-1]))
        found: npt.NDArray[np.int64] = np.add.reduceat(lengths_of(self._encoded)[self._members], starts)
        return found

    @staticmethod
    def _row(examples: list[AnyEncoded]) -> Row:
        if isinstance(examples[0], EncodedImage):
            return examples[0]
        return PackedRow(tuple(example for example in examples if isinstance(example, Encoded)))


def rows_of(
    encoded: Sequence[AnyEncoded], length: int, *, packing: bool = True, order: Sequence[int] | None = None
) -> Rows:
    """Return the rows of examples. Texts without labels are packed, in order; all others get a row each.

    A text is put into the first row that has room for it.

    Args:
        encoded: examples of one kind.
        length: most tokens of a packed row.
        packing: whether texts without labels share rows.
        order: indices of examples; by default all, in their order.

    Raises:
        DataError: if an example is longer than a packed row.
    """
    order = range(len(encoded)) if order is None else order
    if packing and len(encoded) and isinstance(encoded[0], Encoded) and encoded[0].label is None:
        return Rows(encoded, _packed(lengths_of(encoded).tolist(), order, length))
    return Rows(encoded, [(index,) for index in order])


def collate_rows(
    rows: Sequence[Row], pad_id: int, width: int | None = None, segments: int | None = None
) -> AnyBatch:
    """Return the batch of rows of any one kind: images, labelled texts, or packed texts.

    Args:
        rows: rows of one kind.
        pad_id: token to pad with.
        width: tokens to pad packed texts to, for callers that need a fixed shape.
        segments: their number of segments, as in `collate`.

    Raises:
        DataError: as the function for that kind of rows.
    """
    images = [row for row in rows if isinstance(row, EncodedImage)]
    if images:
        return collate_images(images)
    texts = [row for row in rows if isinstance(row, PackedRow)]
    labelled = texts[0].examples[0].label is not None
    return collate_classification(texts, pad_id) if labelled else collate(texts, pad_id, width, segments)


def _packed(lengths: Sequence[int], order: Sequence[int], length: int) -> list[list[int]]:
    """Put each example into the first row that has room for it; return the indices of each row's examples.

    Raises:
        DataError: if an example is longer than a row.
    """
    rows: list[list[int]] = []
    rooms = _Rooms(length)
    for example in order:
        tokens = lengths[example]
        if tokens > length:
            raise DataError(
                f"example {example + 1} has {tokens} tokens, a row {length}: raise data.max_length"
            )
        index, room = rooms.take(tokens)
        if index is None:
            index, room = len(rows), length
            rows.append([])
        rows[index].append(example)
        rooms.put(index, room - tokens)
    return rows


class _Rooms:
    """The rows that are being filled; finds the first with enough room in time logarithmic in a row's length.

    Rows with equal room are in a heap. A tree over the amounts of room, its root at 1 and the leaf of an
    amount at the tree's width plus that amount, has the first row below each node.
    """

    def __init__(self, length: int) -> None:
        self._width = 1 << length.bit_length()
        self._first = [NO_ROW] * (2 * self._width)
        self._heaps: list[list[int]] = [[] for _ in range(self._width)]
        self._room: list[int] = []

    def take(self, tokens: int) -> tuple[int | None, int]:
        """Take out the first row with room for some tokens; return its index and room, or None and 0."""
        first, found = self._first, NO_ROW
        # All nodes that together cover the leaves from `tokens` on.
        low, high = self._width + tokens, 2 * self._width
        while low < high:
            if low & 1:
                found = min(found, first[low])
                low += 1
            low, high = low >> 1, high >> 1
        if found == NO_ROW:
            return None, 0
        room = self._room[found]
        heapq.heappop(self._heaps[room])
        self._update(room)
        return found, room

    def put(self, row: int, room: int) -> None:
        """Add a row that was taken out, or a new one, whose index is the number of rows before it."""
        if row == len(self._room):
            self._room.append(room)
        self._room[row] = room
        heapq.heappush(self._heaps[room], row)
        self._update(room)

    def _update(self, room: int) -> None:
        first, place = self._first, self._width + room
        first[place] = self._heaps[room][0] if self._heaps[room] else NO_ROW
        while place := place >> 1:
            first[place] = min(first[2 * place], first[2 * place + 1])


def collate(
    rows: Sequence[PackedRow], pad_id: int, width: int | None = None, segments: int | None = None
) -> Batch:
    """Return a batch of packed rows, padded on the right.

    Args:
        rows: the rows.
        pad_id: token to pad with.
        width: tokens to pad to. The default is the length of the longest row, rounded up to a multiple of 8
            if there are several rows.
        segments: number of segments, for callers that need a fixed shape; those that are too many are empty.
    """
    width = width or _width(rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    labels, positions = np.full_like(ids, IGNORED), np.zeros_like(ids)
    counted = np.arange(width)
    for number, row in enumerate(rows):
        first = 0
        for example in row.examples:
            last = first + len(example)
            ids[number, first:last], labels[number, first:last] = example.arrays
            positions[number, first:last] = counted[: len(example)]
            first = last
    # The first token of an example is not learnt: nothing in its segment precedes it.
    after = np.flatnonzero((labels != IGNORED) & (positions > 0))
    lengths = [[len(example) for example in row.examples] for row in rows]
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        offsets=_offsets(lengths, width, segments),
        completion_index=torch.from_numpy(after - 1),
        targets=torch.from_numpy(labels.ravel()[after]),
    )


def collate_classification(rows: Sequence[PackedRow], pad_id: int) -> ClassBatch:
    """Return a batch of rows that have one labelled example each.

    Raises:
        DataError: if an example has no class.
    """
    width = _width(rows)
    labels = []
    for row in rows:
        (example,) = row.examples
        if example.label is None:
            raise DataError(
                "an example without a class can't train a classifier; set data.format: classification"
            )
        labels.append(example.label)
    ids = _pad([row.examples[0].input_ids for row in rows], width, pad_id)
    mask = _pad([[1] * len(row) for row in rows], width, 0)
    return ClassBatch(ids, mask, torch.tensor(labels))


def collate_images(images: Sequence[EncodedImage]) -> ImageBatch:
    """Return a batch of labelled images. Their pixels are prepared here.

    Raises:
        DataError: if an image has no class, can't be read, or differs in size after it is prepared.
    """
    labels = [image.label for image in images if image.label is not None]
    if len(labels) < len(images):
        raise DataError(
            "an image without a class can't train a classifier; move it into the folder of its class"
        )
    pixels = [image.pixels for image in images]
    if len({item.shape for item in pixels}) > 1:
        raise DataError(
            "the model's image processor returns images of different sizes, which can't share a batch; set "
            "size and do_resize in its preprocessor_config.json"
        )
    return ImageBatch(torch.from_numpy(np.stack(pixels)), torch.tensor(labels))


def _width(rows: Sequence[PackedRow]) -> int:
    return padded([*map(len, rows)])


def padded(lengths: Sequence[int]) -> int:
    """Return the width of a batch of rows of some lengths."""
    longest = max(lengths)
    return longest if len(lengths) == 1 else -(-longest // MULTIPLE) * MULTIPLE


def _pad(rows: Sequence[Sequence[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _offsets(lengths: Sequence[Sequence[int]], width: int, count: int | None) -> torch.Tensor:
    """Return the offsets of rows of segments: (S + 1,) int32; the padding of a row is a segment too.

    Args:
        lengths: for each row, the lengths of its segments.
        width: T.
        count: S, for a fixed shape; the segments that are too many are empty.
    """
    ends = [0]
    for number, row in enumerate(lengths, start=1):
        for length in row:
            ends.append(ends[-1] + length)
        if ends[-1] < number * width:
            ends.append(number * width)
    if count is not None:
        ends += [ends[-1]] * (count + 1 - len(ends))
    return torch.tensor(ends, dtype=torch.int32)

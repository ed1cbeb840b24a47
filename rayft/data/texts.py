"""Encoded texts in memory, or mapped from files that all workers of a machine share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from rayft.data.example import Example, named
from rayft.data.section import TooLong
from rayft.data.template import IGNORED, Encoded, counted
from rayft.errors import DataError

__all__ = ["Gathered", "Mapped", "Shape", "Texts", "first_learnt", "gather", "lengths_of", "notes"]

Numbers = npt.NDArray[np.int64]
Item = TypeVar("Item")


def lengths_of(encoded: Sequence[Any]) -> Numbers:
    """Return the number of tokens of each text (1 for an image): (N,)."""
    if isinstance(encoded, Texts | Mapped):
        return encoded.lengths
    return np.fromiter(map(len, encoded), np.int64, len(encoded))


def first_learnt(text: Encoded) -> int:
    """Return the index of the first token that is learnt, or the number of tokens if none is."""
    return next((place for place, label in enumerate(text.labels) if label != IGNORED), len(text))


def gather(encoded: Sequence[Item], indices: Sequence[int]) -> list[Item]:
    """Return some items by their indices; items that lie on disk are read together."""
    if isinstance(encoded, Gathered):
        return encoded.gather(indices)
    return [encoded[index] for index in indices]


class Gathered(Sequence[Item]):
    """A sequence whose items are made when they are asked for, several at once."""

    @abstractmethod
    def gather(self, indices: Sequence[int]) -> list[Item]:
        """Return some items by their indices."""

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        numbers = range(len(self))[index]
        return self.gather(numbers) if isinstance(numbers, range) else self.gather([numbers])[0]


class Mapped(Gathered[Encoded]):
    """Texts in Arrow files, which are read when they are asked for.

    The columns are `ids` and `learnt`, a list for each text, and `label`.
    """

    def __init__(self, files: Sequence[Path], lengths: Numbers) -> None:
        """Map the files.

        Args:
            files: the files, in order.
            lengths: number of tokens of each text: (N,).

        Raises:
            OSError: if one can't be read.
        """
        import datasets

        found = [datasets.Dataset.from_file(str(file)) for file in files]
        self._rows = datasets.concatenate_datasets(found).with_format("arrow")
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def gather(self, indices: Sequence[int]) -> list[Encoded]:
        """Return the texts of some rows."""
        return self.pieces(indices, [0] * len(indices), self.lengths[np.asarray(indices, np.int64)].tolist())

    def pieces(self, indices: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> list[Encoded]:
        """Return pieces of the texts of some rows (see `_piece`), without reading the rest.

        Args:
            indices: the rows.
            starts: first token of each piece.
            lengths: number of tokens of each piece.
        """
        if not len(indices):
            return []
        found: list[Encoded] = []
        places = iter(zip(starts, lengths, strict=True))
        for batch in self._rows[[*map(int, indices)]].to_batches():
            for row, label in enumerate(batch.column("label").to_pylist()):
                start, length = next(places)
                ids = batch.column("ids")[row].values.to_numpy()
                # Of a text to classify the last token is needed too.
                first, end = (start, start + length) if label is None else (0, len(ids))
                tokens = ids[first:end]
                learnt = batch.column("learnt")[row].values.slice(first, end - first)
                labels = np.where(learnt.to_numpy(zero_copy_only=False), tokens, IGNORED)
                if first:
                    labels[0] = IGNORED
                text = Encoded(tuple(tokens.tolist()), tuple(labels.tolist()), label)
                found.append(_piece(text, 0, length))
        return found


@dataclass(frozen=True)
class Shape:
    """What is known of N texts without reading them."""

    lengths: Numbers
    """Number of tokens: (N,)."""
    first: Numbers
    """Index of the first token that is learnt, or the number of tokens if none is: (N,)."""
    example: Numbers
    """Index of the example that the text is of: (N,), ascending."""
    raw: bool
    """Whether the texts are neither conversations nor classified."""

    def before(self, example: int) -> Shape:
        """Return the shape of the texts of the first examples."""
        end = int(np.searchsorted(self.example, example))
        return Shape(self.lengths[:end], self.first[:end], self.example[:end], self.raw)


class Texts(Gathered[Encoded]):
    """Texts, or pieces of them, that are no longer than a limit.

    `drop` leaves out the texts that are too long. `cut` divides raw text into pieces; of a conversation it
    keeps the end, so that the learnt answers stay whole; of a text to classify the start and the last token,
    which may be special.

    An example may be encoded as several texts, each with other answers of it. Messages count examples.
    """

    def __init__(
        self,
        source: Sequence[Encoded],
        shape: Shape,
        limit: int,
        how: TooLong,
        part: str,
        examples: Sequence[Example],
        remedy: str = "raise data.max_length",
    ) -> None:
        """Choose what is left of each text.

        Args:
            source: the texts; those beyond the shape's are not used.
            shape: of the texts.
            limit: most tokens of a text.
            how: what to do with longer ones; with `error` there must be none.
            part: name of the texts in messages.
            examples: those of the part, of which a message shows one.
            remedy: what to do for a higher limit, in messages.

        Raises:
            DataError: if cutting would cut an answer.
        """
        self._source, whole = source, shape.lengths
        over = np.flatnonzero(whole > limit)
        rows, starts, lengths = np.arange(len(whole)), np.zeros_like(whole), whole
        self.note = ""
        """What was dropped or cut, as a sentence."""
        which = ""
        if len(over):
            which = f"{counted(shape.example[over], shape.example)} with more than {limit} tokens"
        if not which:
            pass
        elif how == "drop":
            rows = np.flatnonzero(whole <= limit)
            starts, lengths = starts[rows], whole[rows]
            left = np.isin(shape.example[over], shape.example[rows]).any()
            what = f"dropped {'answers of ' if left else ''}{which}"
            self.note = f"{part}: {what} (the longest has {whole.max()})"
        elif shape.raw:
            pieces = -(-whole // limit)
            rows = np.repeat(rows, pieces)
            starts = (np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * limit
            lengths = np.minimum(whole[rows] - starts, limit)
            # Of a piece of one token nothing would be learnt.
            kept = (lengths > 1) | (starts == 0)
            rows, starts, lengths = rows[kept], starts[kept], lengths[kept]
            self.note = f"{part}: divided {which} into pieces"
        else:
            needed = whole - shape.first
            worst = over[needed[over].argmax()]
            if needed[worst] >= limit:
                index = int(shape.example[worst])
                name, problem = named(part, index, examples[index]), self._too_long(int(worst), shape, limit)
                raise DataError(f"{name}: {problem}: {remedy}, or set data.too_long: drop")
            lengths = np.minimum(whole, limit)
            starts = whole - lengths
            self.note = f"{part}: cut {which} (the longest had {whole.max()})"
        self._rows, self._starts, self.lengths = rows, starts, lengths

    def _too_long(self, worst: int, shape: Shape, limit: int) -> str:
        """Describe a text whose answers can't be kept whole, the longest of all such texts."""
        (text,) = gather(self._source, [worst])
        whole, answers = (
            int(shape.lengths[worst] - shape.first[worst]),
            len(text) - text.labels.count(IGNORED),
        )
        between = f", and {whole} with the turns between them" if whole > answers else ""
        alike = shape.example[shape.lengths - shape.first >= limit]
        return (
            f"its answers have {answers} tokens{between}, so they can't be kept whole in {limit} with a "
            f"token before them (so it is for {counted(alike, shape.example)})"
        )

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, indices: Sequence[int]) -> list[Encoded]:
        """Return some of the texts."""
        chosen = np.asarray(indices, np.int64)
        rows, starts, lengths = (of[chosen].tolist() for of in (self._rows, self._starts, self.lengths))
        if isinstance(self._source, Mapped):
            return self._source.pieces(rows, starts, lengths)
        return [
            _piece(text, start, length)
            for text, start, length in zip(gather(self._source, rows), starts, lengths, strict=True)
        ]


def notes(encoded: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return what was dropped or cut of each part, except of `test`, all of whose questions are scored."""
    return [
        texts.note
        for part, texts in encoded.items()
        if part != "test" and isinstance(texts, Texts) and texts.note
    ]


def _piece(text: Encoded, start: int, length: int) -> Encoded:
    """Return some tokens of a text, whose first is not learnt, since nothing precedes it."""
    if length == len(text):
        return text
    if text.label is not None:
        ids = (*text.input_ids[: length - 1], text.input_ids[-1])
        return Encoded(ids, (IGNORED,) * length, text.label)
    end = start + length
    return Encoded(text.input_ids[start:end], (IGNORED, *text.labels[start + 1 : end]))

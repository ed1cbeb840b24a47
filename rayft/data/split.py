"""Divide the rows of files into train, val and test, so that no question is in two of them.

Within a file, only a row that says exactly what an earlier row says is a repeat: several answers to one
question are several rows. Between parts, a question stays in test before val before train. Where one file
is split, all rows of a question go to the same part, so none is lost.

A conversation is learnt with all its answers. It therefore belongs to the part of every row that asks one
of the questions that it answers on the way.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from rayft.data.example import Example, quoted
from rayft.data.files import Table
from rayft.data.section import DataConfig
from rayft.errors import DataError
from rayft.numerics import derive_seed

__all__ = ["Dropped", "shown", "split"]

SHARE = 0.1
"""Of a file that is split, the part that val and test get each, where no size is given."""


@dataclass(frozen=True)
class Dropped:
    """Rows that were left out for one reason."""

    rows: int
    """How many."""
    text: str
    """How many of which file, why, and one of them, in a sentence."""


@dataclass(frozen=True)
class _Row:
    """An example with what it is compared by, which takes time to compute."""

    example: Example
    index: int
    """Number of the row in its table."""
    identity: str
    asked: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.asked[-1]


class _File:
    """The rows of a file that are left; those that were dropped are added to `dropped`."""

    def __init__(self, table: Table, examples: Sequence[Example], seed: int, dropped: list[Dropped]) -> None:
        self.table, self.dropped, self.total = table, dropped, len(examples)
        self.rows = [_Row(e, index, e.identity, e.asked) for index, e in enumerate(examples)]
        self.noun, self.question, self.answer = _words(examples[0])
        self._seed = seed

    def drop_repeats(self) -> None:
        """Keep the first of the rows that say the same."""
        first: dict[str, int] = {}
        for row in self.rows:
            first.setdefault(row.identity, row.index)
        both = " and ".join(filter(None, (self.question, self.answer)))
        repeats = [row for row in self.rows if first[row.identity] != row.index]
        self.drop(repeats, f"whose {both} an earlier one has")

    def drop_asked(self, part: str, keys: Set[str]) -> None:
        """Drop the rows that answer a question of another part."""
        asking = [row for row in self.rows if not keys.isdisjoint(row.asked)]
        self.drop(asking, f"whose {self.question} is in {part}")

    def drop(self, rows: Sequence[_Row], which: str) -> None:
        """Drop rows, and record which they are with the first of them."""
        if not rows:
            return
        gone = {row.index for row in rows}
        self.rows = [row for row in self.rows if row.index not in gone]
        example = self._example(min(rows, key=lambda row: row.index))
        text = f"{self.table.name}: dropped {len(rows)} of {self.total} {self.noun} {which} ({example})"
        self.dropped.append(Dropped(len(rows), text))

    def ordered(self) -> list[_Row]:
        """Order the rows by the seed and what they say alone, not by where they stand in the file.

        The order ignores case, width and spacing: questions that differ in nothing else are neighbours, and
        mostly come into the same part.
        """

        def place(row: _Row) -> tuple[int, str, str]:
            return derive_seed("split", self._seed, _folded(row.example)), row.key, row.identity

        return sorted(self.rows, key=place)

    def _example(self, row: _Row) -> str:
        line = f"the first is {self.table.line(row.index)}"
        image = row.example.image
        if image is None:
            return f"{line}: {shown(row.example)}"
        return line if image.data is not None else f"the first is {image.name}"


def split(
    files: Mapping[str, tuple[Table, Sequence[Example]]], config: DataConfig
) -> tuple[dict[str, list[Example]], tuple[Dropped, ...]]:
    """Give each part its examples, and tell which rows were dropped.

    Args:
        files: the table of each part that has one, with the examples of its rows. Parts without a table are
            split off `train`.
        config: sizes and seed. A part that is split off is as large as the configuration says; where it says
            nothing, it is a tenth of the rows or less, but one question at least.

    Raises:
        DataError: if there are too few rows for a part.
    """
    dropped: list[Dropped] = []
    parts: dict[str, list[_Row]] = {}
    for part in (part for part in ("test", "val") if part in files):
        file = _open(files[part], parts, config, dropped)
        wanted: int | None = getattr(config, part)
        _check_size(file.rows, wanted or 1, part, len(file.rows), dropped)
        parts[part] = file.rows if wanted is None else file.ordered()[:wanted]
    file = _open(files["train"], parts, config, dropped)
    groups, total = _groups(file.ordered()), len(file.rows)
    missing = [part for part in ("test", "val") if part not in files]
    for left, part in zip(range(len(missing), 0, -1), missing, strict=True):
        wanted = getattr(config, part)
        size = wanted or max(1, round(SHARE * total))
        parts[part], cut, groups = _fill(groups, size, left if wanted is None else None)
        file.drop(cut, f"whose {file.question} is in {part}, which has the {size} that it should have")
        _check_size(parts[part], wanted or 1, part, total, dropped)
    rest = [row for group in groups for row in group]
    parts["train"] = rest if config.train is None else rest[: config.train]
    _check_size(parts["train"], config.train or 1, "train", total, dropped)
    return {part: [row.example for row in rows] for part, rows in parts.items()}, tuple(dropped)


def shown(example: Example) -> str:
    """Quote the start of a question, on one line and without control characters."""
    text = example.messages[-2].content if len(example.messages) > 1 else example.question
    return quoted(text)


def _open(
    source: tuple[Table, Sequence[Example]],
    parts: Mapping[str, Sequence[_Row]],
    config: DataConfig,
    dropped: list[Dropped],
) -> _File:
    """List the rows of a file that are no repeats and ask nothing that the parts before it ask."""
    file = _File(*source, config.seed, dropped)
    file.drop_repeats()
    for part, rows in parts.items():
        file.drop_asked(part, {row.key for row in rows})
    return file


def _words(example: Example) -> tuple[str, str, str]:
    """Name a row of a data set, what it asks, and what answers it."""
    if example.image is not None:
        return "images", "file content", "class"
    if example.messages:
        return "rows", "question", "answer"
    return "rows", "text", "class" if example.label_name else ""


def _folded(example: Example) -> str:
    """Return the question without its case, width and spacing; of an image, the hash of its file."""
    if example.image is not None:
        return example.image.digest
    return " ".join(unicodedata.normalize("NFKC", example.question).casefold().split())


def _groups(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Gather the rows that must be in one part, in the order of the first row of each group."""
    from scipy.cluster.hierarchy import DisjointSet

    together = DisjointSet(row.key for row in rows)
    for row in rows:
        for key in row.asked:
            if key in together:
                together.merge(row.key, key)
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault(together[row.key], []).append(row)
    return list(groups.values())


def _fill(
    groups: list[list[_Row]], size: int, keep: int | None
) -> tuple[list[_Row], list[_Row], list[list[_Row]]]:
    """Choose the first groups that fit into a part of some size.

    Args:
        groups: to choose from.
        size: rows that the part should have.
        keep: groups to leave for other parts; then the part may be smaller, or consist of one group that is
            larger. None if it must have exactly `size` rows; then a group is cut if no group fits.

    Returns:
        The rows of the part, those that were cut off, and the groups that are left.
    """
    chosen: list[_Row] = []
    left: list[list[_Row]] = []
    for number, group in enumerate(groups):
        spare = keep is None or len(left) + len(groups) - number > keep
        if spare and len(chosen) + len(group) <= size:
            chosen += group
        else:
            left.append(group)
    if left and len(chosen) < size and (keep is None or not chosen):
        smallest = min(left, key=len)
        left.remove(smallest)
        end = size - len(chosen) if keep is None else len(smallest)
        return [*chosen, *smallest[:end]], smallest[end:], left
    return chosen, [], left


def _check_size(rows: Sequence[_Row], wanted: int, part: str, total: int, dropped: Sequence[Dropped]) -> None:
    if len(rows) < wanted:
        why = "".join(f"; {item.text}" for item in dropped)
        raise DataError(
            f"too little data: {part} should have {wanted} examples and gets {len(rows)} of {total} "
            f"different ones (all rows of a question are in one part{why}); ask for less"
        )

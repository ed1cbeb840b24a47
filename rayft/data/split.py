"""Divide the rows of files into train, val and test, so that no question is in two of them.

Within a file, a row is a repeat only if it equals an earlier row exactly: rows with the same question and
different answers are all kept. If files of two parts have the same question, it is kept in test rather than
in val, and in val rather than in train. If one file is split, all rows of a question go to the same part, so
that none has to be dropped.

All answers of a conversation are learnt. It must therefore be in the same part as every row that asks one of
the questions that it answers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from rayft.data.example import Example, shown
from rayft.data.files import Table
from rayft.data.section import DataConfig
from rayft.errors import DataError
from rayft.numerics import derive_seed

__all__ = ["Dropped", "split"]

BLANK = Example()
"""A raw text without any text."""

SHARE = 0.1
"""The share of a file that val and test each get if the configuration does not set their sizes."""


@dataclass(frozen=True)
class Dropped:
    """Rows that were left out for the same reason."""

    rows: int
    """Number of rows."""
    text: str
    """A sentence with the number, the file, the reason, and one of the rows."""


@dataclass(frozen=True)
class _Row:
    """An example with its identity and its keys, which take time to compute."""

    example: Example
    index: int
    """Number of the row in its table."""
    identity: str
    asked: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.asked[-1]


class _File:
    """The rows of a file that are left. Rows that are dropped are added to `dropped`."""

    def __init__(self, table: Table, examples: Sequence[Example], seed: int, dropped: list[Dropped]) -> None:
        self.table, self.dropped, self.total = table, dropped, len(examples)
        self.rows = [_Row(e, index, e.identity, e.asked) for index, e in enumerate(examples)]
        self.noun, self.question, self.answer = _words(examples[0])
        self._seed = seed

    def drop_blank(self) -> None:
        """Drop the raw texts of which nothing could be learnt."""
        self.drop([row for row in self.rows if row.example == BLANK], "that are blank")

    def drop_repeats(self) -> None:
        """Keep only the first of equal rows."""
        first: dict[str, int] = {}
        for row in self.rows:
            first.setdefault(row.identity, row.index)
        both = " and ".join(filter(None, (self.question, self.answer)))
        repeats = [row for row in self.rows if first[row.identity] != row.index]
        self.drop(repeats, f"whose {both} an earlier one has")

    def drop_asked(self, part: str, keys: Set[str]) -> None:
        """Drop the rows that answer a question of another part.

        Args:
            part: name of the other part.
            keys: keys of its questions.
        """
        asking = [row for row in self.rows if not keys.isdisjoint(row.asked)]
        self.drop(asking, f"whose {self.question} is in {part}")

    def drop(self, rows: Sequence[_Row], which: str) -> None:
        """Drop rows, and record their number, the reason `which` and the first of them."""
        if not rows:
            return
        gone = {row.index for row in rows}
        self.rows = [row for row in self.rows if row.index not in gone]
        example = self._example(min(rows, key=lambda row: row.index))
        text = f"{self.table.name}: dropped {len(rows)} of {self.total} {self.noun} {which} ({example})"
        self.dropped.append(Dropped(len(rows), text))

    def ordered(self) -> list[_Row]:
        """Return the rows in an order that depends only on the seed and their content, not on the file.

        The order ignores case, width and spacing. Questions that differ in nothing else are therefore
        neighbours, and are mostly put into the same part.
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
    """Divide the examples into parts.

    Args:
        files: the table of each part that has one, with the examples of its rows. Parts without a table are
            split off `train`.
        config: has the sizes and the seed. If it does not set the size of a part that is split off, the part
            gets a tenth of the rows at most, and one question at least.

    Returns:
        The examples of each part, and the rows that were dropped.

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


def _open(
    source: tuple[Table, Sequence[Example]],
    parts: Mapping[str, Sequence[_Row]],
    config: DataConfig,
    dropped: list[Dropped],
) -> _File:
    """Open a file without blank texts, its repeats, and the questions of the parts before it."""
    file = _File(*source, config.seed, dropped)
    file.drop_blank()
    file.drop_repeats()
    for part, rows in parts.items():
        file.drop_asked(part, {row.key for row in rows})
    return file


def _words(example: Example) -> tuple[str, str, str]:
    """Return the words for the rows of a data set, for a question and for an answer, for messages."""
    if example.image is not None:
        return "images", "file content", "class"
    if example.messages:
        return "rows", "question", "answer"
    return "rows", "text", "class" if example.label_name else ""


def _folded(example: Example) -> str:
    """Return the question without case, width and spacing, or the hash of an image."""
    if example.image is not None:
        return example.image.digest
    return " ".join(unicodedata.normalize("NFKC", example.question).casefold().split())


def _groups(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Group the rows that must be in the same part. Groups are ordered by their first rows."""
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
        groups: the groups to choose from.
        size: number of rows that the part should have.
        keep: number of groups to leave for other parts. The part may then be smaller than `size`, or consist
            of one larger group. None if it must have exactly `size` rows; then a group is cut if no group
            fits.

    Returns:
        The rows of the part, the rows that were cut off, and the groups that are left.
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
            f"different ones (all rows of a question are in one part{why}); reduce the sizes of the parts"
        )

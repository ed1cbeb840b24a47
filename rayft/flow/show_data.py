"""The tables of `rayft data`."""

from __future__ import annotations

from rich.table import Table

from rayft.data.source import PARTS
from rayft.flow.data import DataView, ImagePart, ImageView, PartView

__all__ = ["class_table", "image_line", "image_table", "text_table"]

CLASSES = 20
"""How many classes are listed, the most frequent first."""


def text_table(found: DataView) -> Table:
    """Return a table of the lengths of texts, in tokens. Classes are not learnt as tokens."""
    learnt = () if found.labels else ("learnt",)
    table = _table("part", "examples", "texts", "tokens", *learnt, "median", "95 %", "longest")
    for part in found.parts:
        assert isinstance(part, PartView)
        share = () if found.labels else (f"{part.learnt:.0%}",)
        lengths = (part.median, part.most, part.longest)
        numbers = (part.examples, part.texts, part.tokens)
        table.add_row(part.name, *map(_count, numbers), *share, *map(_count, lengths))
    return table


def image_table(found: DataView) -> Table:
    """Return a table of the images as they are stored: their sizes in pixels, and Pillow's modes."""
    table = _table("part", "images", "smallest", "median", "largest", "modes")
    for part in found.parts:
        assert isinstance(part, ImagePart)
        modes = [f"{count:,} {mode}" for mode, count in part.modes.items()]
        table.add_row(part.name, _count(part.examples), *map(_size, part.sizes), ", ".join(modes))
    return table


def class_table(found: DataView) -> Table:
    """Return a table of the number of examples of each class, the most frequent in training first."""
    table = _table("class", *PARTS)
    ordered = sorted(found.labels.items(), key=lambda item: [-count for count in item[1]])
    for name, counts in ordered[:CLASSES]:
        table.add_row(name, *map(_count, counts))
    if rest := ordered[CLASSES:]:
        sums = map(sum, zip(*(counts for _, counts in rest), strict=True))
        table.add_row(f"{len(rest)} more classes", *map(_count, sums))
    return table


def image_line(image: ImageView) -> str:
    """Return a description of an image."""
    return f"{image.name}, {_size(image.size)} {image.mode}, class {image.label}"


def _table(*columns: str) -> Table:
    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _count(number: int) -> str:
    return f"{number:,}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"

"""Forwards of the packed engine, laid out by hand."""

from __future__ import annotations

from collections.abc import Sequence

from rayft.serving.packed_row import Part, Row


def parts_of(rows: Sequence[Row]) -> list[Part]:
    """Lay what rows have not read end to end."""
    parts, start = [], 0
    for one in rows:
        parts.append(Part(one, start, start + one.unread))
        start += one.unread
    return parts

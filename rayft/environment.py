"""Set environment variables for a while."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

__all__ = ["environment", "restore", "values_of"]


def values_of(names: Iterable[str]) -> dict[str, str | None]:
    """Return the values of environment variables; None for those that are not set."""
    return {name: os.environ.get(name) for name in names}


def restore(values: Mapping[str, str | None]) -> None:
    """Set environment variables to the values that `values_of` returned."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables within a block, and restore them afterwards."""
    before = values_of(values)
    os.environ.update(values)
    try:
        yield
    finally:
        restore(before)

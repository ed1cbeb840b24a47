"""List the files and functions that are longer than usual: `python -m tests.meta.sizes`.

A review decides whether such a file holds one idea and whether such a function reads well. Nothing fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.meta.source import Function, Source, code

FILE_LINES = 400
FUNCTION_LINES = 50


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def long_ones(files: Sequence[Source]) -> Iterator[str]:
    """Return a line for each file and each function that is over its limit."""
    for source in files:
        if source.lines > FILE_LINES:
            yield f"{source.name}: {source.lines} lines"
        for function in source.functions:
            if length(function) > FUNCTION_LINES:
                yield f"{source.name}:{function.lineno}: {function.name} has {length(function)} lines"


if __name__ == "__main__":
    found = [*long_ones(code())]
    if found:
        print(f"To look at in a review (files over {FILE_LINES} lines, functions over {FUNCTION_LINES}):")
        print(*found, sep="\n")

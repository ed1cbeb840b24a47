"""The repository's own source files: each is read and parsed once, for all rules."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A Python file of the repository."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Path from the root of the repository."""
        return str(self.path.relative_to(ROOT))

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    @property
    def classes(self) -> Iterator[ast.ClassDef]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))


@cache
def sources(folder: str) -> tuple[Source, ...]:
    """Return the Python files below a folder of the repository, sorted by path."""
    return tuple(read(path) for path in sorted((ROOT / folder).rglob("*.py")))


def read(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    return Source(path, text, ast.parse(text))


def code() -> tuple[Source, ...]:
    """Return the files of the package and its entry points."""
    return sources("rayft") + sources("pipelines")


def everything() -> tuple[Source, ...]:
    folders = ("rayft", "pipelines", "serve", "examples", "benchmarks", "tests")
    return tuple(source for folder in folders for source in sources(folder))


def check_none(found: Iterable[str]) -> None:
    """Fail with all that a rule found, one a line: pytest would shorten a list."""
    lines = "\n".join(found)
    assert not lines, lines

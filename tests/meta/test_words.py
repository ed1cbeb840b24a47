"""Words that docs/glossary.md replaces are used no more: each rule lists all places where one is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.meta.source import ROOT, Source, check_none, everything

OPENINGS = re.compile(r"(Gives?|Says?|Tells?|Told|Hears?)\b")
"""How no docstring begins: "Return", "Explain", "Report" and "Receive" are the usual verbs."""

RIVAL = re.compile(r"(?<![a-z])rivals?(?![a-z])", re.IGNORECASE)
"""A PEFT method, whether in prose or in a name."""

KEPT = re.compile(r"\b(rival_seconds|over_rival)\b")
"""Metrics of benchmarks/results, whose names readers rely on."""

# A name and what it was used for; other uses of such a word are English, or another library's.
JOB = re.compile(r"_?work|Work|Order")
"""What a lane is asked to do: a job."""
EVENT = re.compile(r"(?:.*_)?told")
"""A callback: `on_event`, or what it is called for."""
RECORD = re.compile(r"(?:Sweep|Report)?Frame")
"""What a sweep found, as saved: a record."""


def checked() -> list[Source]:
    """Return the files that the rules hold for: all but this one."""
    return [source for source in everything() if source.name != "tests/meta/test_words.py"]


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Return every string that is a statement: the docstrings of modules, classes, functions and fields."""
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Return the names that a file defines, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def openings(tree: ast.AST) -> list[int]:
    """Return the lines of docstrings that open with a retired verb."""
    return [node.lineno for node in docstrings(tree) if OPENINGS.match(str(node.value).lstrip())]


def rivals(text: str) -> list[int]:
    """Return the lines that call a PEFT method a rival, in prose or in a name."""
    lines = KEPT.sub("", text).splitlines()
    return [number for number, line in enumerate(lines, start=1) if RIVAL.search(line)]


def retired_names(source: Source) -> list[str]:
    """Return the retired names of jobs, callbacks, records and sequences that a file defines."""
    found = []
    for line, name in names(source.tree):
        retired = any(pattern.fullmatch(name) for pattern in (JOB, EVENT, RECORD))
        row = name == "Row" and source.name.startswith("rayft/serving/")
        if (retired and not name.startswith("test_")) or row:
            found.append(f"{source.name}:{line}: {name}")
    return found


def test_docstrings_open_with_the_usual_verbs() -> None:
    check_none(f"{source.name}:{line}" for source in checked() for line in openings(source.tree))


def test_names_are_the_glossarys() -> None:
    check_none(name for source in checked() for name in retired_names(source))


def test_a_peft_method_is_called_one() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    texts = {source.name: source.text for source in checked()}
    texts |= {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in pages}
    found = [f"{name}: the file's name" for name in texts if RIVAL.search(name)]
    found += [f"{name}:{line}" for name, text in texts.items() for line in rivals(text)]
    check_none(place for place in found if not place.startswith("docs/glossary.md"))


def test_the_rules_can_fail() -> None:
    tree = ast.parse('def f():\n    """Give a number."""\nclass C:\n    x: int\n    """Says how many."""')
    assert openings(tree) == [2, 5]
    assert openings(ast.parse('"""Given a number, return it; as many as were told."""')) == []
    assert rivals("against_rivals = 1\nrival_seconds = over_rival = 2\n# A Rival.\narrivals = 3") == [1, 3]
    text = (
        "class Work: ...\ndef told(work): ...\ndef work_on(order, frame): self._told = Frame\nclass Row: ..."
    )
    source = Source(ROOT / "rayft" / "serving" / "new.py", text, ast.parse(text))
    assert {place.rpartition(" ")[2] for place in retired_names(source)} == {
        *("Work", "told", "Row", "work", "_told")
    }

"""The documented tree and layers are the real ones; relative links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]


def documented() -> list[str]:
    """Read the paths off the tree: two spaces in means below rayft/."""
    tree = TEXT.split("## The tree")[1].split("```")[1]
    paths = []
    for line in tree.strip().splitlines():
        name = line.split()[0]
        paths.append(f"rayft/{name}" if line.startswith("  ") else name)
    return paths


def layers() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = project["tool"]["importlinter"]["contracts"][0]
    return list(contract["layers"])


@pytest.mark.parametrize("path", documented())
def test_what_is_drawn_is_there(path: str) -> None:
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_what_is_there_is_drawn() -> None:
    inside = (ROOT / "rayft").iterdir()
    real = {
        f"rayft/{path.name}{'/' if path.is_dir() else ''}"
        for path in inside
        if path.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    assert real <= set(documented())


def test_the_layers_are_those_that_are_checked() -> None:
    drawn = TEXT.split("## Layers")[1].split("```")[1]
    assert [name.strip() for name in drawn.split("›")] == layers()


def test_every_layer_is_in_the_tree_but_those_to_come() -> None:
    stems = {Path(path).stem for path in documented() if path.startswith("rayft/")}
    to_come = {layer.strip("()") for layer in layers() if layer.startswith("(")}
    assert {layer.strip("()") for layer in layers()} - stems == to_come


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"

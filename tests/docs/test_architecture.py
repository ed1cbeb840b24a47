"""The architecture page lists and draws what exists: the tree, the drawings and the layers."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def documented() -> set[str]:
    """Return the paths in the tree; a line that is indented by two spaces is below rayft/."""
    tree = TEXT.split("## The tree")[1].split("```")[1]
    return {
        f"rayft/{line.split()[0]}" if line.startswith("  ") else line.split()[0]
        for line in tree.strip().splitlines()
    }


def layers() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = project["tool"]["importlinter"]["contracts"][0]
    return list(contract["layers"])


def test_the_tree_lists_files_and_folders_that_exist() -> None:
    wrong = [
        path
        for path in documented()
        if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ]
    assert not wrong, f"docs/architecture.md lists what is not there: {sorted(wrong)}"


def test_the_tree_lists_everything_in_the_package() -> None:
    real = {
        f"rayft/{path.name}{'/' if path.is_dir() else ''}"
        for path in (ROOT / "rayft").iterdir()
        if path.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    assert not real - documented(), "docs/architecture.md lacks these"


def test_the_drawings_name_packages_and_files_that_exist() -> None:
    drawings = re.findall(r"```mermaid\n(.*?)```", TEXT, flags=re.DOTALL)
    pattern = r"(?<![<\w])[a-z_]+/(?:[a-z_/]*\.py)?"
    named = {path for drawing in drawings for path in re.findall(pattern, drawing)}
    assert len(named) > 15
    missing = sorted(path for path in named if not (ROOT / "rayft" / path).exists())
    assert not missing, f"docs/architecture.md draws what is not below rayft/: {missing}"


def test_the_documented_layers_are_those_that_lint_imports_checks() -> None:
    drawn = TEXT.split("## Layers")[1].split("```")[1]
    assert [name.strip() for name in drawn.split("›")] == layers()


def test_every_layer_is_in_the_tree() -> None:
    stems = {Path(path).stem for path in documented() if path.startswith("rayft/")}
    assert not set(layers()) - stems

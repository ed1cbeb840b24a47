"""The index of the documentation leads to every page."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_every_page_is_in_the_index() -> None:
    index = DOCS / "README.md"
    linked = {DOCS / target for target in re.findall(r"\]\(([^):]+)\)", index.read_text(encoding="utf-8"))}
    pages = {path for path in DOCS.rglob("*.md") if path != index}
    missing = {page for page in pages if page not in linked and page.parent not in linked}
    assert not missing, f"docs/README.md links to neither these pages nor their folders: {sorted(missing)}"

"""Links in the documentation lead to files and headings that exist, and the index leads to every page."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md"))]


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the relative links of a page: the file that each leads to, and the heading or ""."""
    found = re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8"))
    return [((page.parent / target) if target else page, anchor) for target, anchor in found]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_lead_to_files_and_headings_that_exist() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target.name}#{anchor}"
        for page in PAGES
        for target, anchor in links(page)
        if not target.exists() or (anchor and anchor not in anchors(target))
    ]
    assert not broken


def test_files_that_pages_name_exist() -> None:
    pattern = r"`((?:rayft|benchmarks|tests|docs|pipelines|serve|clusters|requirements)/[\w./-]+)`"
    named = {
        (page.relative_to(ROOT), path)
        for page in PAGES
        if page.name != "CHANGELOG.md"  # It also names what is gone.
        for path in re.findall(pattern, page.read_text(encoding="utf-8"))
    }
    assert len(named) > 30
    missing = sorted(f"{page}: {path}" for page, path in named if not (ROOT / path).exists())
    assert not missing


def test_every_page_is_in_the_index() -> None:
    index = DOCS / "README.md"
    linked = {target.resolve() for target, _ in links(index)}
    pages = {page for page in PAGES if DOCS in page.parents} - {index}
    missing = [page for page in sorted(pages) if page not in linked and page.parent not in linked]
    assert not missing, "docs/README.md links to neither these pages nor their folders"

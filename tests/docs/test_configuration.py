"""docs/configuration.md has every key of the configurations, as the code has it."""

from __future__ import annotations

import re

from tests.docs.configuration_page import PAGE, page

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", TEXT, flags=re.M)


def test_the_page_is_made_from_the_code() -> None:
    assert page() == TEXT, "stale page: run `python -m tests.docs.configuration_page`"


def test_every_key_has_a_type_and_a_meaning() -> None:
    assert len(ROWS) > 100
    assert [row for row in ROWS if "any value" in row[1] and row[0] not in ("deepspeed", "options")] == []
    assert [key for key, *_, meaning in ROWS if not meaning.endswith((".", "`"))] == []


def test_every_link_to_a_section_has_a_heading() -> None:
    headings = {
        re.sub(r"[^a-z0-9_-]", "", heading.lower()) for heading in re.findall(r"^### (.+)$", TEXT, flags=re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= headings

"""The glossary is in alphabetical order, has each word once, and its words are in use."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
TABLES = [
    re.findall(r"^\| (?!word|---)([^|]+?) \|", section, flags=re.MULTILINE)
    for section in GLOSSARY.split("\n## ")[1:]
]


def test_each_table_is_in_alphabetical_order() -> None:
    for words in TABLES:
        assert words == sorted(words, key=str.lower)


def test_each_word_has_one_meaning_and_is_in_use() -> None:
    words = [re.sub(r" \(.*\)", "", word) for table in TABLES for word in table]
    assert len(words) == len(set(words)) > 40
    sources = [*(ROOT / "rayft").rglob("*.py"), *(ROOT / "docs" / "decisions").glob("*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources).lower()
    assert not [word for word in words if word.lower() not in text]

"""Each message that the troubleshooting page quotes is one that the code can print."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE)


def literals(path: Path) -> list[str]:
    """Return the strings of a module; the values in an f-string become `…`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_every_quoted_message_occurs_in_the_source() -> None:
    assert len(QUOTED) > 40
    text = "\0".join(literal for path in (ROOT / "rayft").rglob("*.py") for literal in literals(path))
    stale = [
        message
        for message in QUOTED
        if not re.search("[^\0]*".join(re.escape(part) for part in message.split("…")), text)
    ]
    assert not stale, "docs/troubleshooting.md quotes what no message says any more"

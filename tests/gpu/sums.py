"""Sums as training data."""

from __future__ import annotations

import json
from pathlib import Path


def sums(folder: Path, most: int = 12) -> str:
    """Write all sums of two numbers below `most`; return the path of the file."""
    lines = [{"prompt": f"{i}+{j}=", "completion": str(i + j)} for i in range(most) for j in range(most)]
    file = folder / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(file)

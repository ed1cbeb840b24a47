"""The documentation's example compiles a kernel for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "adding-a-kernel.md"


def test_the_example_compiles_a_kernel() -> None:
    pytest.importorskip("triton")
    (example,) = re.findall(
        r"^```python\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ".target sm_90" in done.stdout, done.stderr

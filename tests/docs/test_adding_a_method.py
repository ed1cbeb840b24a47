"""The documentation's method is complete: it passes the whole conformance suite as it stands there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayft.methods import METHODS
from rayft.methods.base import Method, MethodConfig
from rayft.models.inject import export, inject
from tests.contract.methods_contract import CASES, PROMISES, Case, run_all

DOC = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


def code_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    """The documented module, imported from a file and registered."""
    (block,) = code_blocks()
    (tmp_path / "documented_method.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found: Method = importlib.import_module("documented_method").METHOD
    monkeypatch.setitem(METHODS, found.name, found)
    yield found
    del sys.modules["documented_method"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_keeps_every_promise(toy: Method, case: Case) -> None:
    run_all(toy, case)


def test_it_runs_in_a_model(toy: Method, tiny_model: object) -> None:
    from torch import nn

    from rayft.artifacts import ArtifactMeta

    assert isinstance(tiny_model, nn.Module)
    injected = inject(tiny_model, MethodConfig(name=toy.name, rank=2), seed=0)
    artifact = export(tiny_model, ArtifactMeta(method=toy.name))
    assert set(artifact.modules) == set(injected.modules)


def test_the_table_names_every_promise() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [made.name for made in PROMISES]


def test_it_opens_with_its_maths_as_the_others_do() -> None:
    (block,) = code_blocks()
    opening = block.split('"""')[1]
    assert all(word in opening for word in ("arXiv:", "Trainable:", "Export to LoRA:", "ΔW"))

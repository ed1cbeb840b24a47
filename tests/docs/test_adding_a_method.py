"""The documentation's methods are complete: each passes the whole conformance suite as it stands there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import MethodError
from rayft.methods import METHODS
from rayft.methods.base import Chain, ChainConfig, InPlace, Method, MethodConfig
from rayft.models.inject import advance, clear, export, inject
from rayft.models.methods import settled
from tests.contract.methods_contract import CASES, CHAIN_CASES, PROMISES, run_all

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "adding-a-method.md"


def code_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


KINDS = {"lora_fa": Method, "asym_chain": Chain, "leading": InPlace}
"""Name of each documented method → its class."""


@pytest.fixture(params=range(len(KINDS)), ids=list(KINDS))
def documented(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Method]:
    """A documented module, imported from a file and registered by nothing but its line in the registry."""
    (tmp_path / "documented_method.py").write_text(code_blocks()[request.param], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found: Method = importlib.import_module("documented_method").METHOD
    monkeypatch.setitem(METHODS, found.name, found)
    yield found
    del sys.modules["documented_method"]


def test_each_kind_of_method_has_an_example(documented: Method) -> None:
    assert type(documented) is KINDS[documented.name]


def test_it_keeps_its_promises(documented: Method) -> None:
    for case in CASES + (CHAIN_CASES if isinstance(documented, Chain) else []):
        run_all(documented, case)


def test_it_trains_in_a_model_and_leaves_it_as_it_was(documented: Method, tiny_model: Any) -> None:
    inject(tiny_model, MethodConfig(), seed=0)
    clear(tiny_model)
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    config = settled(MethodConfig(name=documented.name, rank=2))
    injected = inject(tiny_model, config, seed=0)
    for link in range(config.links):
        if link:
            advance(tiny_model, 0, link)
        tiny_model(input_ids=torch.arange(8).reshape(1, 8)).logits.square().mean().backward()
        for parameter in tiny_model.parameters():
            if parameter.requires_grad:
                parameter.data -= parameter.grad
    artifact = export(tiny_model, ArtifactMeta(method=documented.name))
    assert isinstance(artifact, AdapterArtifact)
    assert set(artifact.modules) == set(injected.modules)
    assert artifact.rank == 2 * config.links
    clear(tiny_model)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_settings_follow_from_the_method_alone(documented: Method) -> None:
    chain = MethodConfig(name=documented.name, chain=ChainConfig(links=2))
    if isinstance(documented, Chain):
        assert settled(chain) == chain
        with pytest.raises(MethodError, match=r"use cola, .* or asym_chain"):
            settled(MethodConfig(name="lora", chain=ChainConfig(links=2)))
    else:
        with pytest.raises(MethodError, match=f"'{documented.name}' is no chain"):
            settled(chain)


def test_the_table_names_every_promise() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [made.name for made in PROMISES]


def test_examples_open_with_their_maths_as_the_others_do() -> None:
    for block in code_blocks():
        opening = block.split('"""')[1]
        assert all(word in opening for word in ("arXiv:", "Trainable:", "Export to LoRA:", "ΔW"))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The examples as files with the names that the page gives them."""
    found = [tmp_path / f"{name}.py" for name in KINDS]
    for path, block in zip(found, code_blocks(), strict=True):
        path.write_text(block, encoding="utf-8")
    return found


def run(*command: str | Path, path: Path = ROOT) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(path)])}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_accepts_the_examples(files: list[Path]) -> None:
    run("ruff", "check", "--no-cache", "--config", "pyproject.toml", *files)
    run("ruff", "format", "--check", "--no-cache", "--config", "pyproject.toml", *files)


@pytest.mark.skipif(not (ROOT / ".mypy_cache").is_dir(), reason="mypy without its cache takes minutes")
def test_the_type_checker_accepts_the_examples(files: list[Path]) -> None:
    run("mypy", *files)


@pytest.mark.slow
def test_no_other_test_has_to_know_a_new_method(files: list[Path], tmp_path: Path) -> None:
    """The tests over the registry pass after the examples have been added to it."""
    registered = "".join(f"METHODS['{path.stem}'] = import_module('{path.stem}').METHOD\n" for path in files)
    imports = "from importlib import import_module\nfrom rayft.methods import METHODS\n"
    (tmp_path / "registers.py").write_text(imports + registered, encoding="utf-8")
    # The promises are checked above.
    run(
        "pytest", "-q", "-p", "registers", "-p", "no:cacheprovider", "-k", "not keeps_its_promises",
        "--basetemp", tmp_path / "own", "tests/contract/test_methods.py", "tests/unit/methods",
        path=tmp_path,
    )  # fmt: skip

"""Rules about the code itself that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = sorted(path for folder in ("rayft", "pipelines") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
METHODS = sorted(
    path
    for path in (ROOT / "rayft" / "methods").glob("*.py")
    if path.stem not in ("__init__", "base", "section")
)

BANNED = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}
MAX_ENTRY_LINES = 80
MAX_FUNCTION_LINES = 50
MAX_CONTRACT = 5
HEAVY = ("torch", "ray", "transformers", "peft", "deepspeed", "mlflow", "datasets", "matplotlib", "scipy")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_there_is_something_to_look_at() -> None:
    assert len(CODE) > 10
    assert {"full", "lora", "cla"} <= {path.stem for path in METHODS}


@pytest.mark.parametrize("path", CODE, ids=short)
def test_names_say_what_is_inside(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    assert not BANNED & set(parts)


@pytest.mark.parametrize(
    "path",
    [path for path in CODE if path.is_relative_to(ROOT / "pipelines")],
    ids=short,
)
def test_entry_points_hold_no_logic(path: Path) -> None:
    assert lines(path) <= MAX_ENTRY_LINES


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("path", CODE, ids=short)
def test_functions_fit_a_screen(path: Path) -> None:
    long = {
        function.name: size
        for function in functions(ast.parse(path.read_text(encoding="utf-8")))
        if (size := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not long


def contract_methods(node: ast.ClassDef) -> list[str]:
    """Name what a class asks of those who implement it; nothing for a class that asks nothing."""
    bases = {ast.unparse(base).split("[")[0].rsplit(".", 1)[-1] for base in node.bases}
    own = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    if "Protocol" in bases:
        return [item.name for item in own]
    return [item.name for item in own if any("abstract" in ast.unparse(d) for d in item.decorator_list)]


@pytest.mark.parametrize("path", CODE, ids=short)
def test_contracts_are_small(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            asked = contract_methods(node)
            assert len(asked) <= MAX_CONTRACT, f"{node.name} asks for {asked}"


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_opens_with_its_maths(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert "Trainable:" in text
    assert "Export to LoRA:" in text
    assert "ΔW" in text
    if path.stem != "full":
        assert "arXiv:" in text


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_has_its_page_and_its_test(path: Path) -> None:
    assert (ROOT / "docs" / "methods" / f"{path.stem}.md").is_file()
    assert (ROOT / "tests" / "unit" / "methods" / f"test_{path.stem}.py").is_file()


def typed_tolerances(tree: ast.AST) -> list[int]:
    """Find the lines that type a tolerance in by hand."""
    return [
        keyword.value.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg in ("rtol", "atol", "rel", "abs") and isinstance(keyword.value, ast.Constant)
    ]


@pytest.mark.parametrize("path", TESTS, ids=short)
def test_tolerances_are_derived(path: Path) -> None:
    assert not typed_tolerances(ast.parse(path.read_text(encoding="utf-8")))


def without_encoding(tree: ast.AST) -> list[int]:
    """Find the lines that read or write text in whatever encoding the locale has."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        binary = any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in node.args)
        # `Path.open` and `open` alike; classes of ours have a name in front that begins with a capital.
        opens = name == "open" and not binary and not re.match(r"([A-Z]|os\b|PIL\b)", ast.unparse(node.func))
        texts = {keyword.arg for keyword in node.keywords} & {"text", "universal_newlines"}
        if (
            name in ("read_text", "write_text")
            or opens
            or (texts and name in ("run", "Popen", "check_output"))
        ):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", [*CODE, *sorted((ROOT / "benchmarks").rglob("*.py"))], ids=short)
def test_text_is_utf_8_whatever_the_locale(path: Path) -> None:
    assert not without_encoding(ast.parse(path.read_text(encoding="utf-8")))


def test_importing_rayft_does_no_work() -> None:
    code = f"import sys, rayft; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_the_rules_can_fail() -> None:
    tree = ast.parse(
        "assert_close(a, b, rtol=1e-3)\nassert_close(a, b, rtol=tolerance(x))\napprox(a, rel=0.1)"
    )
    assert typed_tolerances(tree) == [1, 3]
    tree = ast.parse(
        "p.read_text()\np.read_text(encoding='utf-8')\nopen(f)\nopen(f, 'rb')\np.open('w')\nrun(c, text=True)"
    )
    assert without_encoding(tree) == [1, 3, 5, 6]
    wide = "class C(Protocol):\n" + "".join(f"    def m{i}(self): ...\n" for i in range(6))
    protocol = ast.parse(wide).body[0]
    assert isinstance(protocol, ast.ClassDef)
    assert len(contract_methods(protocol)) == 6
    base = ast.parse("class C(ABC):\n    @abstractmethod\n    def m(self): ...\n    def n(self): ...\n").body[
        0
    ]
    assert isinstance(base, ast.ClassDef)
    assert contract_methods(base) == ["m"]

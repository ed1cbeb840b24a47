"""Rules about the code itself that no linter knows. Each rule lists all its offenders at once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

from tests.meta.sizes import FILE_LINES, FUNCTION_LINES, long_ones
from tests.meta.source import ROOT, Source, check_none, code, sources

BANNED = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}
MAX_ENTRY_LINES = 80
MAX_CONTRACT = 5
HEAVY = ("torch", "ray", "transformers", "peft", "deepspeed", "mlflow", "datasets", "matplotlib", "scipy")


def methods() -> list[Source]:
    """Return the files that define one method each."""
    return [
        source
        for source in sources("rayft/methods")
        if source.path.parent.name == "methods" and source.path.stem not in ("__init__", "base", "section")
    ]


def test_the_rules_find_the_files() -> None:
    assert len(code()) > 100
    assert {source.path.stem for source in sources("examples")} >= {"ask", "make_images"}
    assert {"full", "lora", "cla"} <= {source.path.stem for source in methods()}


def test_names_of_files_say_what_is_inside() -> None:
    files = code() + sources("examples") + sources("benchmarks")
    check_none(source.name for source in files if BANNED & {*source.name.removesuffix(".py").split("/")})


def test_entry_points_hold_no_logic() -> None:
    check_none(source.name for source in sources("pipelines") if source.lines > MAX_ENTRY_LINES)


def required_methods(node: ast.ClassDef) -> list[str]:
    """Return the methods that a protocol or an abstract class requires; none for other classes."""
    bases = {ast.unparse(base).split("[")[0].rsplit(".", 1)[-1] for base in node.bases}
    own = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    if "Protocol" in bases:
        return [item.name for item in own]
    return [item.name for item in own if any("abstract" in ast.unparse(d) for d in item.decorator_list)]


def test_contracts_are_small() -> None:
    check_none(
        f"{source.name}: {node.name} requires {required_methods(node)}"
        for source in code()
        for node in source.classes
        if len(required_methods(node)) > MAX_CONTRACT
    )


def test_a_method_opens_with_its_maths() -> None:
    lacking = []
    for source in methods():
        text = ast.get_docstring(source.tree) or ""
        wanted = ["Trainable:", "Export to LoRA:", "ΔW", *(["arXiv:"] if source.path.stem != "full" else [])]
        lacking += [f"{source.name}: {part}" for part in wanted if part not in text]
    check_none(lacking)


def test_a_method_has_its_page_and_its_test() -> None:
    missing = []
    for source in methods():
        stem = source.path.stem
        wanted = (f"docs/methods/{stem}.md", f"tests/unit/methods/test_{stem}.py")
        missing += [path for path in wanted if not (ROOT / path).is_file()]
    check_none(missing)


def typed_tolerances(tree: ast.AST) -> list[int]:
    """Return the lines where a tolerance is a number that somebody typed."""
    return [
        keyword.value.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg in ("rtol", "atol", "rel", "abs") and isinstance(keyword.value, ast.Constant)
    ]


def test_tolerances_are_derived() -> None:
    check_none(
        f"{source.name}:{line}" for source in sources("tests") for line in typed_tolerances(source.tree)
    )


def without_encoding(tree: ast.AST) -> list[int]:
    """Return the lines that read or write text in the encoding of the locale."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        binary = any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in node.args)
        # `Path.open` and `open` both open files. `Session.open` and other classes' methods do not.
        opens = name == "open" and not binary and not re.match(r"([A-Z]|os\b|PIL\b)", ast.unparse(node.func))
        texts = {keyword.arg for keyword in node.keywords} & {"text", "universal_newlines"}
        if (
            name in ("read_text", "write_text")
            or opens
            or (texts and name in ("run", "Popen", "check_output"))
        ):
            found.append(node.lineno)
    return found


def test_text_is_utf_8_whatever_the_locale() -> None:
    files = code() + sources("examples") + sources("benchmarks")
    check_none(f"{source.name}:{line}" for source in files for line in without_encoding(source.tree))


def test_importing_rayft_does_no_work() -> None:
    program = f"import sys, rayft; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
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
    assert len(required_methods(protocol)) == 6
    (base,) = ast.parse("class C(ABC):\n    @abstractmethod\n    def m(self): ...\n    def n(self): ...").body
    assert isinstance(base, ast.ClassDef)
    assert required_methods(base) == ["m"]


def test_long_files_and_functions_are_listed() -> None:
    text = "def f():\n" + "    x = 1\n" * FUNCTION_LINES + "\n" * FILE_LINES
    source = Source(ROOT / "rayft" / "long.py", text, ast.parse(text))
    assert [*long_ones([source])] == [
        f"rayft/long.py: {FUNCTION_LINES + FILE_LINES + 1} lines",
        f"rayft/long.py:1: f has {FUNCTION_LINES + 1} lines",
    ]

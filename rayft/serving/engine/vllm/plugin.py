"""The entry point by which vLLM finds rayft's adapters (group `vllm.general_plugins`).

vLLM calls it in the process of its front end, in that of its engine and in each worker. It replaces one name
of one module: the class of the LoRA manager. Engines that are not configured for rayft
(`additional_config={"rayft": …}`) still get vLLM's own manager.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from packaging.version import Version

from rayft.errors import ResourceError

__all__ = ["ANSWERS", "CONFIG", "ERROR_FILE", "KNOWN", "TRIED", "check_release", "register"]

ANSWERS = "RAYFT_VLLM_ANSWERS"
"""Environment variable with a folder. Each worker leaves the shapes of its linear layers there, by which the
engine knows that the plugin is active in it. A process of vLLM that fails to start leaves the reason."""
ERROR_FILE = "error.txt"
"""Name of the file with that reason: vLLM itself tells it only in its log."""
CONFIG = "rayft"
"""Key of rayft's part in vLLM's `additional_config`."""
KNOWN = (Version("0.26"), Version("0.33"))
"""The releases of vLLM in which the plugin works by their source: the first, and the first after the last.
Releases before 0.26 may answer with another adapter than the one that was asked for (vLLM issue 47724)."""
TRIED = (Version("0.26"), Version("0.27"))
"""The releases with which the plugin was run on a GPU: the first, and the first after the last."""


def check_release(version: str, *, untested: bool) -> None:
    """Refuse a release of vLLM in which adapters may not work.

    Args:
        version: the release.
        untested: whether releases are allowed that were checked on a CPU only.

    Raises:
        ResourceError: if the release is refused.
    """
    release = Version(version)
    if TRIED[0] <= release < TRIED[1] or (untested and KNOWN[0] <= release < KNOWN[1]):
        return
    if KNOWN[0] <= release < KNOWN[1]:
        raise ResourceError(
            f"vLLM {version} was not tried on a GPU with rayft's adapters; install "
            f"vllm>={TRIED[0]},<{TRIED[1]}, or set vllm_untested: true"
        )
    raise ResourceError(
        f"vLLM {version} is not supported; install vllm>={TRIED[0]},<{TRIED[1]} (pip install 'rayft[vllm]')"
    )


def register() -> None:
    """Let vLLM's workers use rayft's LoRA manager; calling it again changes nothing."""
    import vllm
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    stock = mixin.LRUCacheWorkerLoRAManager
    if getattr(stock, "of_rayft", False):
        return
    logging.getLogger("vllm").addHandler(_ToFile(logging.ERROR))

    def manager(vllm_config: Any, device: Any, embedding_modules: dict[str, str]) -> Any:
        options = (vllm_config.additional_config or {}).get(CONFIG)
        if options is None:
            return stock(vllm_config, device, embedding_modules)
        check_release(vllm.__version__, untested=bool(options.get("untested")))
        from rayft.serving.engine.vllm.worker import WorkerManager

        return WorkerManager(vllm_config, device)

    manager.of_rayft = True  # type: ignore[attr-defined]
    mixin.LRUCacheWorkerLoRAManager = manager


class _ToFile(logging.Handler):
    """Writes the exception of each error that is logged to `ERROR_FILE`, in place of the former one."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        folder = Path(os.environ.get(ANSWERS, ""))
        # The folder is deleted when the engine has started.
        if error is not None and ANSWERS in os.environ and folder.is_dir():
            (folder / ERROR_FILE).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")

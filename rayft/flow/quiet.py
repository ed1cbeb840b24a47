"""Hide lines of libraries that say nothing to a user. Imports nothing that takes long to import.

Only lines that are known to be harmless are hidden; every other warning and all errors are shown. Workers
have settings of their own (`rayft.sweep.lane`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["hide_known_lines", "hide_ray_lines", "known_lines_hidden"]

DEEPSPEED_ON_CPU = "Setting accelerator to CPU."
"""What DeepSpeed warns of when it is imported on a machine without GPUs. `rayft doctor` shows which devices
there are."""
SERVE_STOPPED = re.compile(
    r"Task ServeController\.\w+ failed\. There are infinite retries remaining, so the task will be retried\. "
    r"Error: The actor is dead because it was killed by `ray\.kill`\.\s*"
)
"""A raylet reports calls of Ray Serve's controller that fail because the controller has ended. Ray Serve ends
it in this way, and its own shutdown waits for exactly this failure (`graceful_shutdown`). If the controller
dies in any other way, the text differs."""


def hide_known_lines() -> None:
    """Hide the log lines of libraries in this process that are harmless."""
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for name, keep in FILTERS.items():
        logging.getLogger(name).addFilter(keep)


@contextmanager
def known_lines_hidden() -> Iterator[None]:
    """Hide them for the length of a block, or of a function that this decorates.

    It is for functions that a user's program calls: levels that the program has set are kept, and afterwards
    everything is as it was.
    """
    loggers = [logging.getLogger(name) for name in LEVELS]
    unset = [logger for logger in loggers if logger.level == logging.NOTSET]
    added = [(logging.getLogger(name), keep) for name, keep in FILTERS.items()]
    added = [(logger, keep) for logger, keep in added if keep not in logger.filters]
    for logger in unset:
        logger.setLevel(LEVELS[logger.name])
    for logger, keep in added:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in unset:
            logger.setLevel(logging.NOTSET)
        for logger, keep in added:
            logger.removeFilter(keep)


def hide_ray_lines() -> None:
    """Hide the lines that Ray itself prints and that are harmless. Imports Ray."""
    from ray._private import worker

    shown = worker.print_to_stdstream
    if getattr(shown, "hides_known_lines", False):
        return

    def print_to_stdstream(data: dict[str, Any], ignore_prefix: bool) -> None:
        """Print lines of other processes of Ray, except those that are known to be harmless."""
        lines = [line for line in data["lines"] if not SERVE_STOPPED.fullmatch(line)]
        if lines:
            shown({**data, "lines": lines}, ignore_prefix)

    print_to_stdstream.hides_known_lines = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = print_to_stdstream


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _is_not_of_cpu(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(DEEPSPEED_ON_CPU)


LEVELS: Mapping[str, int] = {
    # It logs each step of making MLflow's tables, and MLflow each wait for a new version of a model.
    "alembic": logging.WARNING,
    "mlflow.store.model_registry.abstract_store": logging.WARNING,
    # It logs errors with a traceback, besides raising them.
    "mlflow.store.db.utils": logging.CRITICAL,
    # It logs the name of the unfinished file that it writes.
    "gguf.gguf_writer": logging.WARNING,
    # It logs that a faster kernel is not installed, when PEFT imports bitsandbytes.
    "bitsandbytes.backends.cpu.ops": logging.ERROR,
}
"""Logger → the least level that is shown."""
FILTERS: Mapping[str, Callable[[logging.LogRecord], bool]] = {
    # It logs its progress ("Started Serve", "Application 'rayft' is ready"), and sets the level of its logger
    # to INFO when it is imported. A filter stays.
    "ray.serve": _is_warning,
    "DeepSpeed": _is_not_of_cpu,
}
"""Logger → which of its records are shown."""

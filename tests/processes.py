"""Run commands whose output is kept in files, and wait for what they do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil


@contextmanager
def process(command: Sequence[str], log: Path, **environment: str) -> Iterator[psutil.Popen]:
    """Run a command until the block ends; then end it and all that it has started."""
    with log.open("wb") as file:
        env = {**os.environ, **environment}
        started = psutil.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
        try:
            yield started
        finally:
            family = [started]
            with suppress(psutil.NoSuchProcess):
                family += started.children(recursive=True)
                started.terminate()
            for one in psutil.wait_procs(family, timeout=15)[1]:
                one.kill()


def eventually(check: Callable[[], Any], what: str, seconds: float = 120) -> None:
    """Wait until a condition holds; otherwise fail with `what`."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.25)

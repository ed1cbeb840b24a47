"""The process in which a sweep's first steps are rehearsed (`rayft.flow.sweep.rehearsal`).

A command starts it before its own imports, because on a fresh machine compiling takes longer than all else.
It shows nothing, can't fail the command, and has the lowest priority. It ends with the command, even if that
is killed; when a lane is about to train; or after `MOST_SECONDS`. Until then this module imports nothing
that takes long to import.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import Any

from rayft.sweep.rehearsal import VARIABLE

__all__ = ["main", "start_rehearsal"]

MOST_SECONDS = 150.0
"""How long the process may run."""
FEWEST_CORES = 4
"""With fewer cores, it would take them from the command."""
LOWEST = 19
"""The niceness of the process."""
DEVICES = "/dev/nvidia*"
"""Devices that exist where NVIDIA's driver is loaded."""
LOG = Path("ray", "rehearsal.log")
"""Where a sweep's folder has the log."""
PR_SET_PDEATHSIG = 1

_processes: list[subprocess.Popen[bytes]] = []
"""The process. Its standard input is a pipe that closes with this one."""


def start_rehearsal(config: str, overrides: Sequence[str]) -> None:
    """Start the process, unless it is plain that it would be of no use. Never raises.

    Args:
        config: as `rayft sweep` was given it.
        overrides: settings of the configuration.
    """
    if not _useful():
        return
    with suppress(OSError):
        folder = Path(tempfile.mkdtemp(prefix="rayft-rehearsal-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        path = folder / "running"
        path.touch()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, config, *overrides],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # The command itself downloads what is missing.
            env={**os.environ, VARIABLE: str(path), "HF_HUB_OFFLINE": "1"},
        )
        _processes.append(process)
        # Ray passes it on to the lanes.
        os.environ[VARIABLE] = str(path)
        os.setpriority(os.PRIO_PROCESS, process.pid, LOWEST)


def _useful() -> bool:
    """Return whether there is a GPU, cores to spare, and no named cluster whose machines would train."""
    return (
        VARIABLE not in os.environ
        and bool(glob(DEVICES))
        and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
        and os.environ.get("RAY_ADDRESS", "") in ("", "local")
        and len(os.sched_getaffinity(0)) >= FEWEST_CORES
    )


def main(arguments: Sequence[str]) -> None:
    """Rehearse a sweep in this process, and end it.

    Args:
        arguments: the configuration, and settings of it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    path = Path(os.environ.pop(VARIABLE))
    # Held until this process ends.
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for wait in (_until_the_command_ends, lambda: _until_it_is_over(path)):
        threading.Thread(target=_end_after, args=(wait,), daemon=True).start()
    log = _Log()
    logging.getLogger("rayft").addHandler(log)
    logging.getLogger("rayft").setLevel(logging.INFO)
    try:
        from rayft.flow.sweep.rehearsal import rehearse_sweep

        rehearse_sweep(arguments[0], arguments[1:], path.parent, log.write_to)
    except BaseException:
        logging.getLogger("rayft.flow.rehearse").info("the rehearsal has failed", exc_info=True)
    finally:
        log.wait()
        path.unlink(missing_ok=True)
        # Not by way of destructors, of which those of CUDA, NCCL and threads take seconds.
        os._exit(0)


def _end_after(wait: Any) -> None:
    wait()
    os._exit(0)


def _until_the_command_ends() -> None:
    # The command writes nothing, so there is nothing to read before its end.
    os.read(0, 1)


def _until_it_is_over(path: Path) -> None:
    """Wait until a lane has deleted the file, or the time is over."""
    deadline = time.monotonic() + MOST_SECONDS
    while time.monotonic() < deadline and path.exists():
        time.sleep(0.05)


class _Log(logging.Handler):
    """Writes a log into a sweep's folder once lanes are started there.

    Before, the folder may not exist or not be the sweep's, so lines are kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        self._lines: list[str] = []
        self._file: Path | None = None

    def write_to(self, folder: Path) -> None:
        """Set the sweep's folder."""
        self._file = folder / LOG

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line, and write what is kept if that is possible."""
        self._lines.append(self.format(record))
        self._write()

    def wait(self) -> None:
        """Wait until all is written; this process is then ended in any case, when a lane trains."""
        while self._lines and self._file is not None:
            self._write()
            time.sleep(0.5)

    def _write(self) -> None:
        if self._file is not None and self._file.parent.is_dir():
            with suppress(OSError), self._file.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in self._lines)
            self._lines.clear()


if __name__ == "__main__":
    main(sys.argv[1:])

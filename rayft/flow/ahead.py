"""Start Ray and lanes while a command still imports its modules and checks what it is to train.

Ray starts a lane by way of several processes, one after the other, and each imports much. On a machine with
cores to spare that takes as long as the command's own imports and checks, so both are done at the same time.
If a check fails, the lanes are ended; they have done nothing yet.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rayft.errors import RayftError

__all__ = ["Ahead", "ahead"]

FEWEST_CORES = 4
"""With fewer cores, the lanes would take them from the command."""
CPUS = 256
"""CPU slots of the cluster, which is started before the configuration says how many workers there will be."""


class Ahead:
    """Ray on this machine, and perhaps the lanes of a sweep or run; both start in a thread."""

    def __init__(self) -> None:
        # Imported before the thread starts: of two threads that import a package at the same time, one can
        # find it half imported.
        from rayft.flow import cluster

        self._cluster = cluster
        self._folder = tempfile.mkdtemp(prefix="rayft-lanes-")
        self._config: Any = None
        self._lanes = 0
        self._executor: Any = None
        self._error: BaseException | None = None
        self._configured, self._done, self._over = threading.Event(), threading.Event(), threading.Event()
        # Ray's processes end when the thread ends that has started them, so it lives until `close`.
        threading.Thread(target=self._run, name="rayft-ahead", daemon=True).start()

    def start_lanes(self, config: Any, lanes: int) -> None:
        """Start the lanes, once Ray has started.

        Args:
            config: of the sweep or run (`rayft.flow.config.TrainConfig`); None if no lanes shall be started.
            lanes: their number.
        """
        self._config, self._lanes = config, lanes
        self._configured.set()

    @contextmanager
    def executor(self) -> Iterator[Any]:
        """Wait until Ray has started, yield the executor of the lanes, and end Ray after the block.

        It is None if no lanes were started.

        Raises:
            ResourceError, DiskFullError: if Ray could not be started.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        try:
            with self._cluster.watched():
                yield self._executor
        finally:
            self.close()

    def close(self) -> None:
        """End Ray, once it has started."""
        try:
            self._configured.set()
            self._done.wait()
            self._cluster.stop_cluster()
        finally:
            self._over.set()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self) -> None:
        try:
            self._executor = self._start()
        except BaseException as error:  # noqa: BLE001  (raised again where the executor is needed)
            self._error = error
        self._done.set()
        self._over.wait()

    def _start(self) -> Any:
        self._cluster.check_temporary()
        self._cluster.start_cluster(CPUS)
        self._configured.wait()
        if self._config is None:
            return None
        from rayft.sweep.executor import LaneExecutor
        from rayft.sweep.space import slots_asked

        how, scale = self._config.execution, self._config.run().scale
        executor = LaneExecutor(
            scale, self._folder, self._lanes, how.restarts, self._config.name, how.patience,
            slots_asked(how, scale),
        )  # fmt: skip
        executor.start()
        return executor


@contextmanager
def ahead(config: str, overrides: Sequence[str], *, search: bool = True) -> Iterator[Ahead | None]:
    """Start Ray and the lanes of a sweep or run for the length of a block, if that saves time.

    It saves none on a machine with few cores, and nothing is started if there is a Ray cluster to join. Of a
    sweep that has begun before, only Ray is started, because nothing may be left to train. Mistakes in the
    configuration are left to the command to report.

    Args:
        config: as the command was given it.
        overrides: settings of the configuration.
        search: whether it describes a sweep, and not a run, which has one lane.

    Yields:
        None if nothing was started.
    """
    if not _useful():
        yield None
        return
    started, settings = Ahead(), None
    harmless: tuple[type[BaseException], ...] = ()
    try:
        with suppress(RayftError, OSError):
            settings = _settings(config, overrides, search=search)
        started.start_lanes(settings, settings.execution.lanes if settings and search else 1)
        yield started
    except RayftError:
        # What was wrong is shown even if the wait for Ray's end is interrupted.
        harmless = (KeyboardInterrupt,)
        raise
    finally:
        with suppress(*harmless):
            started.close()


def _useful() -> bool:
    if len(os.sched_getaffinity(0)) < FEWEST_CORES:
        return False
    from rayft.flow.address import find_address

    return not find_address()[0]


def _settings(config: str, overrides: Sequence[str], *, search: bool) -> Any:
    """Return the configuration of what has not begun and trains in lanes; None for anything else."""
    from rayft.flow.cluster import placed
    from rayft.flow.config import STAMP_FILE, load_config, load_train_config
    from rayft.sweep.space import check_executor

    load = load_config if search else load_train_config
    settings = placed(load(config, overrides))
    lanes = check_executor(settings.execution, settings.run()) == "lane"
    return settings if lanes and not (settings.folder / STAMP_FILE).exists() else None

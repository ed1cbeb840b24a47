"""Start Ray and a sweep's lanes while the command still imports its modules and checks the sweep.

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
    """Ray on this machine, and perhaps a sweep's lanes; both start in a thread."""

    def __init__(self) -> None:
        # Imported before the thread starts, because two threads that import a package can meet half of it.
        from rayft.flow import cluster

        self._cluster = cluster
        self._folder = tempfile.mkdtemp(prefix="rayft-lanes-")
        self._config: Any = None
        self._executor: Any = None
        self._error: BaseException | None = None
        self._configured, self._done, self._over = threading.Event(), threading.Event(), threading.Event()
        # Ray's processes end when the thread ends that has started them, so it lives until `close`.
        threading.Thread(target=self._run, name="rayft-ahead", daemon=True).start()

    def start_lanes(self, config: Any) -> None:
        """Start the lanes, once Ray has started.

        Args:
            config: the sweep's (`rayft.flow.config.PipelineConfig`); None if no lanes shall be started.
        """
        self._config = config
        self._configured.set()

    @contextmanager
    def executor(self) -> Iterator[Any]:
        """Wait until Ray has started, yield the executor of the lanes, and end Ray after the block.

        It is None if no lanes were started.

        Raises:
            ResourceError, DiskFullError: if Ray could not be started, or the machine can't hold the lanes.
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
        self._configured.set()
        self._done.wait()
        self._cluster.stop_cluster()
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

        sweep, scale = self._config.sweep, self._config.run().scale
        self._cluster.check_fit(sweep.lanes * scale.workers, scale.device, scale.gpu_share)
        executor = LaneExecutor(
            scale, self._folder, sweep.lanes, sweep.restarts, self._config.name, sweep.patience,
            slots_asked(sweep, scale),
        )  # fmt: skip
        executor.start()
        return executor


@contextmanager
def ahead(config: str, overrides: Sequence[str]) -> Iterator[Ahead | None]:
    """Start Ray and the lanes of a sweep for the length of a block, if that saves time.

    It saves none on a machine with few cores, and nothing is started if there is a Ray cluster to join. Of a
    sweep that has begun before, only Ray is started, because nothing may be left to train. Mistakes in the
    configuration are left to the command to report.

    Args:
        config: as `rayft sweep` was given it.
        overrides: settings of the configuration.

    Yields:
        None if nothing was started.
    """
    if not _useful():
        yield None
        return
    started, settings = Ahead(), None
    try:
        with suppress(RayftError, OSError):
            settings = _settings(config, overrides)
        started.start_lanes(settings)
        yield started
    finally:
        started.close()


def _useful() -> bool:
    if len(os.sched_getaffinity(0)) < FEWEST_CORES:
        return False
    from rayft.flow.address import find_address

    return not find_address()[0]


def _settings(config: str, overrides: Sequence[str]) -> Any:
    """Return the configuration of a sweep that has not begun and trains in lanes; None for any other."""
    from rayft.flow.cluster import placed
    from rayft.flow.config import STAMP_FILE, load_config
    from rayft.sweep.space import check_executor

    settings = placed(load_config(config, overrides))
    lanes = check_executor(settings.sweep, settings.run()) == "lane"
    return settings if lanes and not (settings.folder / STAMP_FILE).exists() else None

"""Workers that stay when a sweep ends, so that the next one need not start a worker group.

A worker group takes as long to start as a small sweep trains. Tests of what a sweep does with its trials run
in these workers; those of worker groups themselves and of processes that die do not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import ray

from rayft.sweep.entrance import Entrance
from rayft.sweep.settings import LaneSettings


class WarmWorker:
    """An actor that is the one worker of a lane, and then of the next."""

    def __init__(self, folder: str) -> None:
        import torch
        import torch.distributed as dist

        from rayft.sweep import lane

        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        # It asks Ray Train, which did not start this process.
        lane.get_device = lambda: torch.device("cpu")
        self._serve_jobs = lane.serve_jobs

    def serve(self, settings: LaneSettings) -> None:
        """Do the jobs of a lane until its broker closes."""
        self._serve_jobs(settings)


class WarmWorkers:
    """Takes the place of the worker groups of executors; lanes that run at the same time have a worker each.

    Args:
        folder: folder for the files of the workers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, 0
        self._idle: list[Any] = []

    @contextmanager
    def used(self) -> Iterator[None]:
        """Run all lanes that start within the block in these workers."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Entrance, "start_lane", lambda *lane, **how: self._start(*lane, **how))
            yield

    def _start(self, entrance: Entrance, lane: str, *, once: bool) -> None:
        settings = LaneSettings(name=lane, broker=entrance.broker, home=entrance.home, once=once)
        ray.get(entrance.broker.expect.remote(lane))
        worker = self._idle.pop() if self._idle else self._new()

        def hold() -> None:
            try:
                ray.get(worker.serve.remote(settings))
            except ray.exceptions.RayTaskError as error:
                # A lane that pulls when the executor has closed finds no broker, and ends by itself.
                with suppress(ray.exceptions.ActorDiedError):
                    ray.get(entrance.broker.lane_died.remote(lane, str(error)))
            finally:
                self._idle.append(worker)

        threading.Thread(target=hold, name=lane, daemon=True).start()

    def _new(self) -> Any:
        self._made += 1
        folder = self._folder / str(self._made)
        folder.mkdir()
        group = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
        options = {"num_cpus": 0, "runtime_env": {"env_vars": group}}
        return ray.remote(WarmWorker).options(**options).remote(str(folder))

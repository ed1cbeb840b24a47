"""Submit jobs to the lanes of an executor, from any process. This module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from rayft.sweep.jobs import Job
from rayft.sweep.settings import HomeNode, LaneSettings

__all__ = ["Entrance"]


@dataclass(frozen=True)
class Entrance:
    """What a process needs to submit jobs: the handles of the actors, and how lanes are started."""

    broker: Any
    """Handle of the broker."""
    home: HomeNode
    """Where the command's files are; it has the handle of the launcher."""
    name: str
    """Prefix of the lanes' names."""
    slots: int | None = 1
    """As `LaneSettings.slots`."""
    isolated: bool = False
    """Whether jobs that are submitted together get a worker group that ends after the last one."""

    def submit(self, jobs: Sequence[Job[Any, Any]], *, again: bool = True) -> None:
        """Queue jobs; the broker has their events.

        Args:
            jobs: the jobs.
            again: whether those that the broker knows as ended are done again.
        """
        lane = f"{self.name}-{jobs[0].id}" if self.isolated else None
        queued = ray.get([self.broker.submit.remote(replace(job, lane=lane), again) for job in jobs])
        if lane is not None and any(queued):
            self.start_lane(lane, once=True)

    def start_lane(self, lane: str, *, once: bool) -> None:
        """Start a lane.

        Args:
            lane: its name.
            once: whether it ends when there is no job left for it.
        """
        settings = LaneSettings(lane, self.broker, self.home, self.slots, once)
        ray.get(self.broker.expect.remote(lane))
        ray.get(self.home.launcher.start.remote(settings))

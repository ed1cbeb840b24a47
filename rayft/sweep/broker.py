"""The broker between a search and the lanes that run its jobs.

A job is a request to train, to score, or work of a layer above. Clients submit jobs and wait for their
events; lanes pull jobs, report, and are told whether to go on. `report` answers only when the client
has asked for the next event (go on) or cancelled (stop): the search decides before the lane takes
another step.

    client:  submit → next_event … next_event → (final | failed)        or cancel
    lane:    pull → log …, report … → finish | fail → pull

A lane that dies comes back under its name and pulls the job it had. Its checkpoint was written
before each report, so it goes on from there, and reports that were taken are not passed on twice.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CLOSE", "Broker", "Event", "Job"]

CLOSE = "close"
"""What `pull` answers when a lane should end."""


@dataclass(frozen=True)
class Job:
    """Something for a lane to do."""

    id: str
    kind: str
    """`train`, or what else a lane does (`rayft.sweep.lane.Work`): `score`, `analyse`; shown to people."""
    payload: bytes
    """What it is asked for, pickled: the broker, through which it goes, imports nothing that it is of."""
    lane: str | None = None
    """The only lane that may take it; any where not given."""

    @classmethod
    def of(cls, id: str, kind: str, request: Any) -> Job:
        """Make a job of a request, an object of an importable module."""
        return cls(id, kind, pickle.dumps(request))

    @property
    def request(self) -> Any:
        """What it is asked for."""
        # Of this cluster, as whatever Ray itself hands on.
        return pickle.loads(self.payload)  # noqa: S301


@dataclass(frozen=True)
class Event:
    """Something that happened to a job."""

    kind: str
    """`report`, `final` or `failed`."""
    step: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Entry:
    job: Job
    events: deque[Event] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    decision: asyncio.Future[bool] | None = None
    lane: str | None = None
    attempts: int = 0
    cancelled: bool = False
    done: bool = False
    last_step: int = 0
    last: Event | None = None
    progress: dict[str, Any] = field(default_factory=dict)


class Broker:
    """An asyncio actor; see the module's text."""

    def __init__(self, attempts: int = 4) -> None:
        self._attempts = attempts
        self._entries: dict[str, _Entry] = {}
        self._queue: deque[str] = deque()
        self._lanes: dict[str, str] = {}
        self._arrived = asyncio.Condition()
        self._closed = False

    # --- the client's side

    async def submit(self, job: Job) -> None:
        """Queue a job; one of the same id that has not ended stays as it is."""
        entry = self._entries.get(job.id)
        if entry is not None and not entry.done:
            entry.cancelled = False
            return
        self._entries[job.id] = _Entry(job, progress={"state": "queued", "kind": job.kind})
        if self._closed or self._lanes_gone():
            self._end(self._entries[job.id], Event("failed", values={"error": "no lane is running"}))
            return
        async with self._arrived:
            self._queue.append(job.id)
            self._arrived.notify_all()

    async def next_event(self, job_id: str) -> Event:
        """Let the job go on if it waits, and wait for its next event."""
        entry = self._entries[job_id]
        _decide(entry, True)
        while not entry.events:
            entry.changed.clear()
            await entry.changed.wait()
        return entry.events.popleft()

    async def cancel(self, job_id: str) -> None:
        """Stop a job: its lane is told at its next report, or never gets it."""
        entry = self._entries.get(job_id)
        if entry is None or entry.done:
            return
        entry.cancelled = True
        _decide(entry, False)
        if entry.lane is None:
            entry.done = True

    # --- the lane's side

    async def pull(self, lane: str, timeout: float = 20.0) -> Job | str | None:
        """Give a lane its next job, `CLOSE`, or None after `timeout` seconds without any."""
        self._lanes[lane] = "up"
        orphan = self._orphan(lane)
        if orphan is not None:
            return orphan
        deadline = time.monotonic() + timeout
        while True:
            job = self._take(lane)
            if job is not None:
                return job
            if self._closed:
                return CLOSE
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            async with self._arrived:
                try:
                    await asyncio.wait_for(self._arrived.wait(), left)
                except TimeoutError:
                    return None

    async def log(self, job_id: str, progress: Mapping[str, Any]) -> None:
        """Take a job's progress for the display."""
        self._entries[job_id].progress.update(progress)

    async def report(self, job_id: str, step: int, values: Mapping[str, Any]) -> bool:
        """Pass an evaluation on and wait for the decision: True to go on."""
        entry = self._entries[job_id]
        entry.progress.update({"step": step, **values})
        if entry.cancelled:
            return False
        if step <= entry.last_step:
            return True
        entry.last_step = step
        entry.decision = asyncio.get_running_loop().create_future()
        self._push(entry, Event("report", step, values))
        return await entry.decision

    async def finish(self, job_id: str, step: int, values: Mapping[str, Any]) -> None:
        """End a job with its result."""
        self._end(self._entries[job_id], Event("final", step, values))

    async def fail(self, job_id: str, error: str) -> None:
        """End a job with an error; its lane goes on."""
        self._end(self._entries[job_id], Event("failed", values={"error": error}))

    async def lane_lost(self, lane: str, error: str) -> None:
        """Take a lane out for good; with the last one, every job that waits fails."""
        self._lanes[lane] = "lost"
        for entry in self._entries.values():
            stranded = self._lanes_gone() or entry.job.lane == lane
            if not entry.done and (entry.lane == lane or (entry.lane is None and stranded)):
                self._end(entry, Event("failed", values={"error": error}))

    # --- both

    async def snapshot(self) -> list[dict[str, Any]]:
        """Show every job: id, kind, state, lane, step and its last numbers."""
        return [
            {"id": entry.job.id, "lane": entry.lane, **entry.progress} for entry in self._entries.values()
        ]

    async def result(self, job_id: str) -> Event | None:
        """Wait until a job's lane has let go of it, and give its last event (None if it never ran)."""
        entry = self._entries.get(job_id)
        if entry is None:
            return None
        while not entry.done:
            await asyncio.sleep(0.02)
        return entry.last

    async def close(self) -> None:
        """Tell every lane to end when it next pulls."""
        self._closed = True
        for entry in self._entries.values():
            _decide(entry, False)
        async with self._arrived:
            self._arrived.notify_all()

    def _orphan(self, lane: str) -> Job | None:
        """Find the job that this lane had when it died."""
        for entry in self._entries.values():
            if entry.lane != lane or entry.done:
                continue
            if entry.cancelled or self._closed:
                entry.done = True
            elif entry.attempts >= self._attempts:
                message = f"its lane died {entry.attempts} times; look at the worker logs for why"
                self._end(entry, Event("failed", values={"error": message}))
            else:
                entry.attempts += 1
                entry.decision = None
                entry.progress["state"] = "running"
                return entry.job
        return None

    def _take(self, lane: str) -> Job | None:
        for job_id in list(self._queue):
            entry = self._entries[job_id]
            if entry.done or entry.cancelled:
                self._queue.remove(job_id)
            elif entry.job.lane in (None, lane):
                self._queue.remove(job_id)
                entry.lane, entry.attempts = lane, 1
                entry.progress["state"] = "running"
                return entry.job
        return None

    def _lanes_gone(self) -> bool:
        return bool(self._lanes) and all(state == "lost" for state in self._lanes.values())

    def _push(self, entry: _Entry, event: Event) -> None:
        entry.events.append(event)
        entry.changed.set()

    def _end(self, entry: _Entry, event: Event) -> None:
        if entry.last is not None:
            return
        entry.done, entry.last = True, event
        entry.progress["state"] = "stopped" if entry.cancelled else event.kind
        self._push(entry, event)


def _decide(entry: _Entry, go_on: bool) -> None:
    if entry.decision is not None and not entry.decision.done():
        entry.decision.set_result(go_on)
    entry.decision = None

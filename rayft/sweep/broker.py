"""The broker between a search and the lanes that run its jobs.

A job is a request to train, to score, or work of a layer above. Clients submit jobs and wait for their
events; lanes pull jobs, report, and are told whether to go on. `report` answers only when the client
has asked for the next event (continue) or cancelled (stop): the search decides before the lane takes
another step.

    client:  submit → next_event … next_event → (final | failed | interrupted)   or cancel
    lane:    pull → log …, report … → finish | fail | pause → pull

An event stays until its client asks for the one after it, so a client that dies loses none. The job of a
lane that dies goes back to the head of the queue, also one that was cancelled meanwhile, and the next lane
that is free takes it. Its checkpoint was written before each report, so the job continues from there,
reports what it has reported before, and gets the same answers.

Every worker of a lane tells the broker each second that it lives. If a worker is silent, or computes nothing,
the broker reports it after some time, and ends it after a longer time; its lane then starts again.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rayft.errors import DiskFullError, ResourceError

__all__ = ["CLOSE", "Beat", "Broker", "Event", "Job", "Patience", "Verdict"]

CLOSE = "close"
"""What `pull` answers when a lane should end."""
Verdict = Literal["continue", "stop", "interrupt"]
"""What a lane is told at a report. `interrupt`: save a checkpoint, for the next command to continue from."""

SURE_SECONDS = 60.0
"""How long Ray may take to be sure that a node which does not answer is lost."""
FATAL = {"disk": DiskFullError, "lanes": ResourceError}
"""Why no job can succeed any more (the disk is full, no lane can start) → the error that ends the sweep."""


@dataclass(frozen=True)
class Patience:
    """How long a lane may be silent or stand still, in seconds."""

    warn: float = 120.0
    """Until a person is told."""
    kill: float = 1800.0
    """Until its processes are ended."""


@dataclass(frozen=True)
class Beat:
    """A worker's sign of life."""

    rank: int
    ticks: int
    """Counts the batches that it has computed."""
    memory: int = 0
    """Bytes of its resident set."""
    pid: int = 0
    node: str = ""
    """Id of the Ray node that it runs on."""
    at: float = 0.0
    """When the broker heard it, by the broker's own clock: those of two machines can't be compared."""


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
    """`report`, `final`, `failed` or `interrupted`."""
    step: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    number: int = field(default=0, compare=False)
    """Its place among the job's events, from 1."""

    def raise_fatal(self) -> None:
        """Raise what ends the whole sweep.

        Raises:
            DiskFullError, ResourceError: if the event tells of one.
        """
        if fatal := self.values.get("fatal"):
            raise FATAL[fatal](str(self.values["error"]))


@dataclass
class _Entry:
    job: Job
    events: deque[Event] = field(default_factory=deque)
    """Those that the client has not acknowledged."""
    pushed: int = 0
    given: int = 0
    """Number of the last event that was given to a client."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    decision: asyncio.Future[Verdict] | None = None
    """Of the report at `last_step`, until it is made."""
    lane: str | None = None
    stop_at: int | None = None
    """The step at which the client has stopped it."""
    done: bool = False
    last_step: int = 0
    last: Event | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    ticks: Mapping[int, int] = field(default_factory=dict)
    moved: float = 0.0
    """When a worker last computed something."""
    warned: bool = False
    killed: bool = False
    deaths: list[str] = field(default_factory=list)
    """Why its lane died, each time."""


class Broker:
    """An asyncio actor; see the module's text.

    Args:
        attempts: how often a job is given to a lane, if the lane dies each time.
        patience: how long a lane may be silent.
    """

    def __init__(self, attempts: int = 4, patience: Patience | None = None) -> None:
        self._attempts = attempts
        self._patience = patience or Patience()
        self._entries: dict[str, _Entry] = {}
        self._queue: deque[str] = deque()
        self._lanes: dict[str, int] = {}
        """Lane → how often in a row it has died without a job."""
        self._beats: dict[str, dict[int, Beat]] = {}
        self._notices: list[str] = []
        self._arrived = asyncio.Condition()
        self._closed = False
        self._interrupted = False
        self._fatal: Mapping[str, str] = {}
        self._watcher: asyncio.Task[None] | None = None

    # --- the client's side

    async def submit(self, job: Job) -> None:
        """Queue a job; one of the same id that has not ended stays as it is."""
        entry = self._entries.get(job.id)
        if entry is not None and not entry.done:
            return
        entry = self._entries[job.id] = _Entry(job, progress={"state": "queued", "kind": job.kind})
        if self._closed:
            self._end(entry, self._refusal())
            return
        async with self._arrived:
            self._queue.append(job.id)
            self._arrived.notify_all()

    async def next_event(self, job_id: str, after: int | None = None) -> Event:
        """Wait for a job's next event; to ask for it acknowledges those before, and lets the job continue.

        Args:
            job_id: the job.
            after: number of the last event that the client has dealt with; the last one that was given to
                anybody, where not given.
        """
        entry = self._entries[job_id]
        after = entry.given if after is None else after
        while entry.events and entry.events[0].number <= after:
            entry.events.popleft()
        if not any(event.kind == "report" for event in entry.events):
            _decide(entry, "continue")
        while not entry.events:
            entry.changed.clear()
            await entry.changed.wait()
        entry.given = entry.events[0].number
        return entry.events[0]

    async def cancel(self, job_id: str, step: int | None = None) -> None:
        """Stop a job at a step: its lane is told at that report. One that nobody has begun is dropped.

        Args:
            job_id: the job.
            step: the step of the report that decided it; the last one reported, where not given.
        """
        entry = self._entries.get(job_id)
        if entry is None or entry.done:
            return
        entry.stop_at = entry.last_step if step is None else step
        _decide(entry, "stop")
        if entry.lane is None and not entry.stop_at:
            entry.done = True

    async def interrupt(self) -> list[str]:
        """End everything where it is, and return the ids of the trials that have a checkpoint to write."""
        self._interrupted = True
        training = []
        for entry in self._entries.values():
            if entry.done:
                continue
            if entry.lane is None or entry.job.kind != "train":
                self._end(entry, Event("interrupted"))
            else:
                training.append(entry.job.id)
        await self.close()
        return training

    async def settled(self) -> None:
        """Wait until no lane trains."""
        while any(not entry.done for entry in self._entries.values()):
            await asyncio.sleep(0.05)

    # --- the lane's side

    async def expect(self, lane: str) -> None:
        """Count on a lane that is being started."""
        self._lanes[lane] = 0

    async def pull(self, lane: str, timeout: float = 20.0) -> Job | str | None:
        """Give a lane its next job, `CLOSE`, or None after `timeout` seconds without any."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
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

    async def beat(self, lane: str, beat: Beat) -> bool:
        """Take a worker's sign of life, and return whether a trial that it trains is to be interrupted."""
        self._beats.setdefault(lane, {})[beat.rank] = replace(beat, at=time.monotonic())
        return self._closed

    async def log(self, job_id: str, progress: Mapping[str, Any]) -> None:
        """Take a job's progress for the display."""
        self._entries[job_id].progress.update(progress)

    async def tell(self, text: str) -> None:
        """Show a line to the person who started the sweep."""
        self._notices.append(text)

    async def report(self, job_id: str, step: int, values: Mapping[str, Any]) -> Verdict:
        """Pass an evaluation on and wait for the verdict; one that was reported before gets the same."""
        entry = self._entries[job_id]
        entry.progress.update({"step": step, **values})
        if self._closed:
            return "interrupt"
        if entry.stop_at is not None and step >= entry.stop_at:
            return "stop"
        if step > entry.last_step:
            entry.last_step = step
            entry.decision = asyncio.get_running_loop().create_future()
            self._push(entry, Event("report", step, values))
        if step < entry.last_step or entry.decision is None:
            return "continue"
        # A lane that died while it waited, and came back, waits beside its former self.
        return await asyncio.shield(entry.decision)

    async def finish(self, job_id: str, step: int, values: Mapping[str, Any]) -> None:
        """End a job with its result."""
        self._end(self._entries[job_id], Event("final", step, values))

    async def fail(self, job_id: str, error: str, *, fatal: bool = False) -> None:
        """End a job with an error; its lane continues.

        Args:
            job_id: the job.
            error: what a person reads.
            fatal: whether no other job can succeed either (the disk is full): then all end with this error.
        """
        if fatal:
            await self.fail_all(error)
        else:
            self._end(self._entries[job_id], Event("failed", values={"error": error}))

    async def fail_all(self, error: str, fatal: str = "disk") -> None:
        """End every job with an error of `FATAL` after which none can succeed, and close."""
        self._fatal = self._fatal or {"error": error, "fatal": fatal}
        for entry in self._entries.values():
            if not entry.done:
                self._end(entry, self._refusal())
        await self.close()

    async def pause(self, job_id: str, step: int) -> None:
        """End a job that has saved a checkpoint, for the next command to continue."""
        self._end(self._entries[job_id], Event("interrupted", step))

    async def lane_died(self, lane: str, reason: str) -> bool:
        """Take the reason why a lane's processes ended, and return whether it should be started again.

        A job whose lane has died too often fails. A lane that dies too often without a job is not started
        again; if that is the last one, all that waits ends with an error. What ended with its node does not
        count: another node may take it.
        """
        beats = self._beats.pop(lane, {})
        memory = max((beat.memory for beat in beats.values()), default=0)
        lost = await _lost(reason, beats.values())
        reason = lost or reason
        used = f" when it used {memory / 2**30:.1f} GiB" if memory else ""
        entry = next((one for one in self._entries.values() if one.lane == lane and not one.done), None)
        if self._closed:
            if entry is not None:
                self._end(entry, Event("interrupted", entry.last_step))
            return False
        if entry is None and lost:
            self._notices.append(f"{lane} ended without a job: {reason}")
            return True
        if entry is None:
            return await self._died_idle(lane, f"{reason}{used}")
        self._notices.append(f"{entry.job.id}: {lane} ended{used}: {reason}")
        if not lost:
            entry.deaths.append(f"{reason}{used}")
        if len(entry.deaths) >= self._attempts:
            error = f"its lane died {len(entry.deaths)} times, the last time because {entry.deaths[-1]}"
            self._end(entry, Event("failed", values={"error": error}))
        else:
            await self._again(entry)
        own = self._pinned(lane)
        return not own or any(not one.done for one in own)

    async def _again(self, entry: _Entry) -> None:
        """Queue a job whose lane is gone before all others."""
        entry.lane = None
        entry.progress["state"] = "queued"
        async with self._arrived:
            self._queue.appendleft(entry.job.id)
            self._arrived.notify_all()

    async def _died_idle(self, lane: str, reason: str) -> bool:
        self._lanes[lane] += 1
        self._notices.append(f"{lane} ended without a job: {reason}")
        if self._lanes[lane] < self._attempts:
            return True
        del self._lanes[lane]
        error = f"{lane} can't be started, {self._attempts} times, the last time because {reason}"
        own = self._pinned(lane)
        for entry in own:
            if not entry.done:
                self._end(entry, Event("failed", values={"error": error}))
        if not own and not self._lanes:
            await self.fail_all(f"{error}. What is done is kept; run the same command again", "lanes")
        return False

    def _pinned(self, lane: str) -> list[_Entry]:
        """Return the jobs that no other lane may take."""
        return [entry for entry in self._entries.values() if entry.job.lane == lane]

    async def depend_on(self, launcher: Any) -> None:
        """End with the process that holds the lanes, so that nobody waits for lanes that are gone.

        Args:
            launcher: handle of the actor.
        """
        from ray.exceptions import RayError

        try:
            await launcher.stay.remote()
        except RayError:
            # Ray's own way out of an actor waits for the calls that wait for the lanes.
            os._exit(1)

    # --- both

    async def snapshot(self) -> list[dict[str, Any]]:
        """Show every job: id, kind, state, lane, its processes, step and its last numbers."""
        return [
            {
                "id": entry.job.id,
                "lane": entry.lane,
                "pids": [beat.pid for beat in self._beats.get(entry.lane or "", {}).values()],
                **entry.progress,
            }
            for entry in self._entries.values()
        ]

    async def result(self, job_id: str) -> Event | None:
        """Wait until a job's lane has let go of it, and give its last event (None if it never ran)."""
        entry = self._entries.get(job_id)
        if entry is None:
            return None
        while not entry.done:
            await asyncio.sleep(0.02)
        return entry.last

    async def notices(self, after: int = 0) -> list[str]:
        """Return what a person should read, from the notice `after` on."""
        return self._notices[after:]

    async def close(self) -> None:
        """Tell every lane to end when it next pulls; a trial that still trains is interrupted."""
        self._closed = True
        for entry in self._entries.values():
            _decide(entry, "interrupt")
        async with self._arrived:
            self._arrived.notify_all()

    def _refusal(self) -> Event:
        """Return what becomes of a job that no lane will take."""
        if self._fatal:
            return Event("failed", values=self._fatal)
        if self._interrupted:
            return Event("interrupted")
        return Event("failed", values={"error": "no lane is running"})

    async def _watch(self) -> None:
        """Look for lanes that are silent or stand still."""
        pause = min(max(self._patience.warn / 4, 0.2), 15.0)
        while not self._closed:
            await asyncio.sleep(pause)
            for entry in self._entries.values():
                if entry.lane is not None and not entry.done:
                    self._look_at(entry, entry.lane)

    def _look_at(self, entry: _Entry, lane: str) -> None:
        beats, now, patience = self._beats.get(lane, {}), time.monotonic(), self._patience
        if not beats:
            return
        ticks = {rank: beat.ticks for rank, beat in beats.items()}
        # Who waits for the search, or does what has no batches to count, does not stand still.
        if ticks != entry.ticks or entry.decision is not None or entry.job.kind != "train":
            entry.ticks, entry.moved = ticks, now
        silent = max(beats.values(), key=lambda beat: now - beat.at)
        quiet = max(now - silent.at, now - entry.moved)
        what = "is silent" if now - silent.at > now - entry.moved else "computes nothing"
        text = f"{entry.job.id}: process {silent.pid} of {lane} {what} for {quiet:.0f} s"
        if quiet >= patience.kill and not entry.killed:
            entry.killed = True
            self._notices.append(f"{text}; it is ended, and its trial continues from the last checkpoint")
            for beat in beats.values():
                _end_process(beat)
        elif quiet >= patience.warn and not entry.warned:
            entry.warned = True
            self._notices.append(f"{text}; after {patience.kill:.0f} s it is ended (sweep.hang_seconds)")
        elif quiet < patience.warn and entry.warned:
            entry.warned = False
            self._notices.append(f"{entry.job.id}: {lane} goes on")

    def _begin(self, entry: _Entry, lane: str) -> None:
        self._lanes[lane] = 0
        entry.lane, entry.moved = lane, time.monotonic()
        entry.killed = entry.warned = False
        entry.progress["state"] = "running"

    def _take(self, lane: str) -> Job | None:
        for job_id in list(self._queue):
            entry = self._entries[job_id]
            if entry.done:
                self._queue.remove(job_id)
            elif entry.job.lane in (None, lane):
                self._queue.remove(job_id)
                self._begin(entry, lane)
                return entry.job
        return None

    def _push(self, entry: _Entry, event: Event) -> None:
        entry.pushed += 1
        entry.events.append(replace(event, number=entry.pushed))
        entry.changed.set()

    def _end(self, entry: _Entry, event: Event) -> None:
        if entry.last is not None:
            return
        entry.done, entry.last = True, event
        # What a full disk ends has not failed: the next command continues it.
        state = "interrupted" if event.values.get("fatal") else event.kind
        stopped = entry.stop_at is not None and event.kind == "final"
        entry.progress["state"] = "stopped" if stopped else state
        self._push(entry, event)


def _decide(entry: _Entry, verdict: Verdict) -> None:
    if entry.decision is not None and not entry.decision.done():
        entry.decision.set_result(verdict)
    entry.decision = None


async def _lost(reason: str, beats: Collection[Beat]) -> str:
    """Return that a lane's node was lost, and which one, if that is why it ended; else an empty text."""
    from rayft.sweep.launcher import NODE_LOST, UNREACHABLE

    deadline = time.monotonic() + (SURE_SECONDS if reason == UNREACHABLE else 0.0)
    while not (gone := _dead_nodes(beats)) and time.monotonic() < deadline:
        await asyncio.sleep(1.0)
    if gone:
        return f"{NODE_LOST} ({', '.join(gone)})"
    return reason if reason == NODE_LOST else ""


def _dead_nodes(beats: Collection[Beat]) -> list[str]:
    """Return the addresses of the nodes that workers were on and that Ray has no more."""
    import ray

    if not ray.is_initialized():
        return []
    dead = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]}
    return sorted({dead[beat.node] for beat in beats if beat.node in dead})


def _end_process(beat: Beat) -> None:
    """End a worker on its own machine: one that is stopped hears nothing that is sent to it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(beat.pid)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

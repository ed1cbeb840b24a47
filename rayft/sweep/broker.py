"""The broker between a search and the lanes that run its jobs.

Clients submit jobs (`rayft.sweep.jobs`) and wait for their events. Lanes pull jobs, do them, and report
evaluations. `report` returns only when the client has asked for the next event (the job continues) or has
cancelled the job (it stops), so the search decides before the lane takes another step.

    client:  submit → next_event … next_event → (final | failed | interrupted)   or cancel
    lane:    pull → log …, report … → finish | fail | pause → pull

A lane that has places left in a batch pulls further jobs that can share it (`Job.pack`), so it may have
several jobs at the same time.

An event is kept until its client asks for the next one, so a client that dies loses no event. If a lane dies,
its jobs return to the head of the queue, even if they were cancelled meanwhile, and the next free lane takes
them.
A checkpoint was written before each report, so the job continues from there, repeats its earlier reports, and
receives the same decisions.

If a lane dies that does several jobs, any of them may be the cause. A job whose lanes have died twice since
its last new evaluation is done alone, and returns to the queue after the next one. Only deaths of a lane that
has no other job count against a job.

Every worker of a lane sends a sign of life each second. If a worker sends none, or computes nothing, the
broker first notifies the user, and later kills the lane's processes; the lane then starts again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rayft.sweep.jobs import Event, Job
from rayft.sweep.reasons import NODE_LOST, UNREACHABLE

__all__ = ["CLOSE", "Beat", "Broker", "Patience", "Verdict"]

CLOSE = "close"
"""What `pull` returns when a lane should end."""
Verdict = Literal["continue", "stop", "interrupt"]
"""The answer to a report. `interrupt`: save a checkpoint, from which the next command continues."""

SURE_SECONDS = 60.0
"""How long Ray may take to be sure that a node which does not answer is lost."""


@dataclass(frozen=True)
class Patience:
    """How long a lane may send no sign of life, or compute nothing, in seconds."""

    warn: float = 120.0
    """Time until the user is notified."""
    kill: float = 1800.0
    """Time until the lane's processes are killed."""


@dataclass(frozen=True)
class Beat:
    """A worker's sign of life."""

    rank: int
    ticks: int
    """Number of batches that the worker has computed."""
    memory: int = 0
    """Resident set of the process, in bytes."""
    pid: int = 0
    node: str = ""
    """Id of the Ray node on which the worker runs."""
    at: float = 0.0
    """When the broker received it, by the broker's own clock; the clocks of two machines can't be
    compared."""


@dataclass
class _Signs:
    """What the broker has seen of a lane since it took its last job."""

    moved: float = field(default_factory=time.monotonic)
    """When a worker last computed something."""
    ticks: Mapping[int, int] = field(default_factory=dict)
    warned: bool = False
    killed: bool = False


@dataclass
class _Entry:
    job: Job[Any, Any]
    events: deque[Event] = field(default_factory=deque)
    """Events that the client has not acknowledged."""
    pushed: int = 0
    given: int = 0
    """Number of the last event that a client has received."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    decision: asyncio.Future[Verdict] | None = None
    """The pending decision about the report at `last_step`."""
    lane: str | None = None
    stop_at: int | None = None
    """The step at which the client has stopped the job."""
    left: bool = False
    """Whether no client decides about the job any more."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    last_step: int = 0
    last: Event | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    deaths: list[str] = field(default_factory=list)
    """Why its lane died, each time that it had no other job."""
    setbacks: int = 0
    """How often its lane has died since the job last reported a new evaluation."""
    isolated: bool = False
    """Whether its lane does it alone because of setbacks."""

    @property
    def done(self) -> bool:
        return self.ended.is_set()


class Broker:
    """The actor between clients and lanes; its methods are asyncio coroutines.

    Args:
        attempts: how often a job is given to a lane, if the lane dies each time and has no other job.
        patience: how long a lane may send no sign of life.
    """

    def __init__(self, attempts: int = 4, patience: Patience | None = None) -> None:
        self._attempts = attempts
        self._patience = patience or Patience()
        self._entries: dict[str, _Entry] = {}
        self._queue: deque[str] = deque()
        self._lanes: dict[str, int] = {}
        """Lane → how many times in a row it has died without a job."""
        self._starting: dict[str, float] = {}
        """Lane that has not pulled since its processes were started → when that was. A lane of which the user
        was notified is not in it."""
        self._ended: Counter[str] = Counter()
        """Lane → how often its processes have ended."""
        self._renewed: set[str] = set()
        """Lanes whose worker groups are about to end, and to be started again."""
        self._beats: dict[str, dict[int, Beat]] = {}
        self._signs: dict[str, _Signs] = {}
        self._notices: list[str] = []
        self._spent: dict[str, float] = {}
        self._arrived = asyncio.Condition()
        self._closed = self._last = False
        self._interrupted = False
        self._fatal: Event | None = None
        self._watcher: asyncio.Task[None] | None = None

    # --- the client's side

    async def submit(self, job: Job[Any, Any], again: bool = True) -> bool:
        """Queue a job, unless a job of the same id has not ended yet.

        Args:
            job: the job.
            again: whether a job that has ended, and whose client knows that, is done again.

        Returns:
            Whether it was queued. If only one lane may take it, also true as long as nobody has started that
            lane.
        """
        entry = self._entries.get(job.id)
        # The end of a job that was submitted ahead of its client may be waiting for it.
        waits = entry is not None and (not entry.done or (entry.last is not None and not entry.given))
        if waits or (entry is not None and not again):
            # The process that queued it may have died before it started the lane.
            return entry is not None and not entry.done and job.lane not in (None, *self._lanes)
        entry = self._entries[job.id] = _Entry(job, progress={"state": "queued", "kind": job.kind})
        if self._closed:
            self._end(entry, self._refusal())
            return False
        async with self._arrived:
            self._queue.append(job.id)
            self._arrived.notify_all()
        return True

    async def forget(self, job_ids: Sequence[str]) -> None:
        """Forget jobs that have ended, so that a new search can do them again."""
        for job_id in job_ids:
            if job_id in self._entries and self._entries[job_id].done:
                del self._entries[job_id]

    async def next_event(self, job_id: str, after: int | None = None) -> Event:
        """Return a job's next event, as soon as there is one.

        Asking for an event acknowledges the events before it, and lets the job continue after its last
        report.

        Args:
            job_id: the job.
            after: number of the last event that the client has processed; by default that of the last event
                that any client has received.
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

    async def cancel(self, job_id: str, step: int) -> None:
        """Stop a job at a step: the lane learns it from the answer to that report.

        Args:
            job_id: the job.
            step: the step of the report that led to the decision.
        """
        entry = self._entries.get(job_id)
        if entry is None or entry.done:
            return
        entry.stop_at = step
        _decide(entry, "stop")

    async def leave(self, job_id: str) -> None:
        """Let a job go on to its end, because the client that decides about it has ended for good."""
        entry = self._entries.get(job_id)
        if entry is None or entry.done:
            return
        entry.left = True
        _decide(entry, "continue")
        self._notices.append(f"{job_id}: the search can't decide about it any more, so it trains to its end")

    async def interrupt(self) -> list[str]:
        """End all jobs, and return the ids of those that still have to write a checkpoint."""
        self._interrupted = True
        saving = []
        for entry in self._entries.values():
            if entry.done:
                continue
            if entry.lane is None or not entry.job.resumable:
                self._end(entry, Event("interrupted"))
            else:
                saving.append(entry.job.id)
        await self.close()
        return saving

    async def settled(self, timeout: float) -> list[str]:
        """Wait until all jobs have ended, for `timeout` seconds; return the ids of those that have not."""
        deadline = time.monotonic() + timeout
        while running := [entry for entry in self._entries.values() if not entry.done]:
            try:
                await asyncio.wait_for(running[0].ended.wait(), deadline - time.monotonic())
            except TimeoutError:
                break
        return [entry.job.id for entry in running]

    # --- the lane's side

    async def expect(self, lane: str) -> None:
        """Register a lane that is being started."""
        self._lanes[lane] = 0

    async def starts(self, lane: str) -> None:
        """Learn that the processes of a lane are being started."""
        self._starting[lane] = time.monotonic()

    async def check_starts(self) -> None:
        """Notify the user of lanes that take too long to start. The caller knows that they have a place."""
        now = time.monotonic()
        late = [lane for lane, since in self._starting.items() if now - since >= self._patience.warn]
        for lane in late:
            self._notices.append(
                f"{lane} has a place, but has not started for {now - self._starting.pop(lane):.0f} s. What "
                "its processes have written is in the folder logs of Ray's session. If it does not start, "
                "interrupt the command and run it again: what is done is kept"
            )

    async def pull(
        self, lane: str, timeout: float = 20.0, pack: str | None = None
    ) -> Job[Any, Any] | str | None:
        """Return a lane's next job, `CLOSE`, or None if there is no job for `timeout` seconds.

        Args:
            lane: the lane.
            timeout: seconds to wait.
            pack: what the job must have in common with those that the lane has; by default it has none.
        """
        self._starting.pop(lane, None)
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        deadline, ended = time.monotonic() + timeout, self._ended[lane]
        while True:
            if self._ended[lane] > ended:
                # Ray does not cancel the call of a process that has died. A job would get lost in the answer.
                return None
            job = self._take(lane, pack)
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
        """Receive a worker's sign of life; return whether its job is to be interrupted."""
        self._beats.setdefault(lane, {})[beat.rank] = replace(beat, at=time.monotonic())
        return self._closed

    async def log(self, job_id: str, progress: Mapping[str, Any]) -> None:
        """Record a job's progress for the display."""
        self._entries[job_id].progress.update(progress)

    async def note(self, text: str) -> None:
        """Add a line for the person who started the sweep."""
        self._notices.append(text)

    async def announce(self, reports: Sequence[tuple[str, int, Mapping[str, float]]]) -> None:
        """Pass on evaluations of several jobs, (job, step, metrics) each; `report` returns the decisions."""
        for job_id, step, metrics in reports:
            self._reported(self._entries[job_id], step, metrics)

    async def report(self, job_id: str, step: int, metrics: Mapping[str, float]) -> Verdict:
        """Pass an evaluation on to the client and return its decision.

        A report that is repeated, by a job that continues from a checkpoint, gets the same decision again.
        """
        entry = self._entries[job_id]
        new = step > entry.last_step
        self._reported(entry, step, metrics)
        if self._closed:
            return "interrupt"
        if entry.stop_at is not None and step >= entry.stop_at:
            return "stop"
        if step < entry.last_step or entry.decision is None:
            return "continue"
        # Shielded, because the call of a lane that died while it waited may be cancelled, when the lane that
        # came back waits for the same decision.
        verdict = await asyncio.shield(entry.decision)
        # What it has learnt is saved, so others can share its lane again.
        return "interrupt" if verdict == "continue" and new and entry.isolated else verdict

    def _reported(self, entry: _Entry, step: int, metrics: Mapping[str, float]) -> None:
        entry.progress.update({"step": step, **metrics})
        stopped = entry.stop_at is not None and step >= entry.stop_at
        if step > entry.last_step and not stopped and not self._closed:
            entry.last_step, entry.setbacks = step, 0
            if not entry.left:
                entry.decision = asyncio.get_running_loop().create_future()
                self._push(entry, Event("report", step, metrics))

    async def finish(
        self, job_id: str, payload: bytes, step: int = 0, metrics: Mapping[str, float] | None = None
    ) -> None:
        """End a job with its pickled result.

        Args:
            job_id: the job.
            payload: the result.
            step: the last step of a trial.
            metrics: what the search is told of a trial, which does not read its result.
        """
        self._end(self._entries[job_id], Event("final", step, metrics or {}, payload))

    async def fail(self, job_id: str, error: str, *, fatal: bool = False) -> None:
        """End a job with an error; its lane continues.

        Args:
            job_id: the job.
            error: the message for the user.
            fatal: whether no other job can succeed either, because the disk is full; then all jobs end with
                this error.
        """
        if fatal:
            await self.fail_all(error)
        else:
            self._end(self._entries[job_id], Event("failed", error=error))

    async def fail_all(self, error: str, fatal: str = "disk") -> None:
        """End every job with an error after which no job can succeed, and close.

        Args:
            error: the message for the user.
            fatal: the kind of error, a key of `jobs.FATAL`.
        """
        self._fatal = self._fatal or Event("failed", error=error, fatal=fatal)
        for entry in self._entries.values():
            if not entry.done:
                self._end(entry, self._refusal())
        await self.close()

    async def pause(self, job_id: str, step: int) -> None:
        """End a job that has saved a checkpoint, from which the next command continues.

        A job that was done alone because its lanes died returns to the queue.
        """
        entry = self._entries[job_id]
        if entry.isolated and not self._closed:
            # Behind others that have to be done alone, and will be packed with it then.
            await self._again(entry, first=False)
        else:
            self._end(entry, Event("interrupted", step))

    async def put_back(self, job_id: str) -> None:
        """Return a job to the queue whose lane has no room for it; it goes on from its last checkpoint."""
        entry = self._entries[job_id]
        if self._closed:
            self._end(entry, Event("interrupted", entry.last_step))
        else:
            await self._again(entry)

    async def renew(self, lane: str, job_id: str, payload: bytes | None, text: str) -> None:
        """Expect the end of a lane's worker group, one of whose workers can't go on with a job.

        Args:
            lane: the lane. It is started again, and its end does not count as a death.
            job_id: the job.
            payload: the pickled request that the new group does in place of the job's; None if the job has
                failed.
            text: the reason, for the user.
        """
        if lane in self._renewed:
            # Another worker of the group was first; its end may be what this one fails for.
            return
        self._renewed.add(lane)
        entry = self._entries[job_id]
        if payload is None:
            self._end(entry, Event("failed", error=text))
        else:
            entry.job = replace(entry.job, payload=payload)
            self._notices.append(f"{job_id}: {text}")

    async def lane_died(self, lane: str, reason: str) -> bool:
        """Handle the end of a lane's processes; return whether the lane should be started again.

        A job fails if its lane has died too often, the last time when it had no other job. A lane that has
        died too often without a job is not started again; if it is the last lane, all waiting jobs end with
        an error. The loss of a node does not count, since another node may take the job.

        Args:
            lane: the lane.
            reason: why its processes ended.
        """
        self._starting.pop(lane, None)
        self._ended[lane] += 1
        beats = self._beats.pop(lane, {})
        memory = max((beat.memory for beat in beats.values()), default=0)
        lost = await _lost(reason, beats.values())
        reason = lost or reason
        used = f" when it used {memory / 2**30:.1f} GiB" if memory else ""
        entries = [one for one in self._entries.values() if one.lane == lane and not one.done]
        if self._closed:
            for entry in entries:
                self._end(entry, Event("interrupted", entry.last_step))
            return False
        if lane in self._renewed:
            self._renewed.remove(lane)
            for entry in reversed(entries):
                await self._again(entry)
            return self._is_needed(lane)
        if not entries and lost:
            self._notices.append(f"{lane} ended without a job: {reason}")
            return True
        if not entries:
            return await self._died_idle(lane, f"{reason}{used}")
        names = ", ".join(entry.job.id for entry in entries)
        self._notices.append(f"{names}: {lane} ended{used}: {reason}")
        # The first in the queue is the first again.
        for entry in reversed(entries):
            if not lost:
                entry.setbacks += 1
                entry.deaths += [f"{reason}{used}"] * (len(entries) == 1)
            count = max(entry.setbacks, len(entry.deaths))
            if len(entries) == 1 and not lost and count >= self._attempts:
                error = f"its lane died {count} times, the last time because {entry.deaths[-1]}"
                self._end(entry, Event("failed", error=error))
            else:
                await self._again(entry)
        return self._is_needed(lane)

    def _is_needed(self, lane: str) -> bool:
        """Return whether there may be jobs for a lane."""
        own = self._pinned(lane)
        return not own or any(not one.done for one in own)

    async def _again(self, entry: _Entry, *, first: bool = True) -> None:
        """Return a job that no lane has any more to the queue, at its head or else at its end."""
        entry.lane = None
        entry.progress["state"] = "queued"
        async with self._arrived:
            (self._queue.appendleft if first else self._queue.append)(entry.job.id)
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
                self._end(entry, Event("failed", error=error))
        if not own and not self._lanes:
            await self.fail_all(f"{error}. What is done is kept; run the same command again", "lanes")
        return False

    def _pinned(self, lane: str) -> list[_Entry]:
        """Return the jobs that only this lane may take."""
        return [entry for entry in self._entries.values() if entry.job.lane == lane]

    async def depend_on(self, launcher: Any) -> None:
        """End this process when the launcher's process ends, so that no client waits for lanes that are gone.

        Args:
            launcher: handle of the launcher.
        """
        from ray.exceptions import RayError

        try:
            await launcher.stay.remote()
        except RayError:
            if not self._last:
                # Ray's own `exit_actor` waits for pending calls, which wait for the lanes.
                os._exit(1)

    # --- both

    async def snapshot(self) -> list[dict[str, Any]]:
        """Return every job's id, kind, state, lane, processes, step and last numbers, for the display."""
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
        """Wait until a job has ended, and return its last event; None if it was never submitted."""
        entry = self._entries.get(job_id)
        if entry is None:
            return None
        await entry.ended.wait()
        return entry.last

    async def spend(self, what: str, seconds: float) -> None:
        """Add to the time that lanes have spent on something."""
        self._spent[what] = self._spent.get(what, 0.0) + seconds

    async def spent(self) -> dict[str, float]:
        """Return what lanes have spent time on: what → seconds, of all lanes together."""
        return dict(self._spent)

    async def notices(self, after: int = 0) -> list[str]:
        """Return the lines for the user, without the first `after` ones."""
        return self._notices[after:]

    async def close(self, *, last: bool = False) -> None:
        """Let every lane end when it next pulls; jobs that wait for a decision are interrupted.

        Args:
            last: whether no client waits any more, so that the launcher may end.
        """
        self._closed, self._last = True, self._last or last
        for entry in self._entries.values():
            _decide(entry, "interrupt")
        async with self._arrived:
            self._arrived.notify_all()

    def _refusal(self) -> Event:
        """Return the last event of a job that no lane will take."""
        if self._fatal:
            return self._fatal
        if self._interrupted:
            return Event("interrupted")
        return Event("failed", error="no lane is running")

    async def _watch(self) -> None:
        """Look for lanes that send no sign of life or compute nothing."""
        pause = min(max(self._patience.warn / 4, 0.2), 15.0)
        while not self._closed:
            await asyncio.sleep(pause)
            found: dict[str, list[_Entry]] = {}
            for entry in self._entries.values():
                if entry.lane is not None and not entry.done:
                    found.setdefault(entry.lane, []).append(entry)
            for lane, entries in found.items():
                self._look_at(lane, entries)

    def _look_at(self, lane: str, entries: Sequence[_Entry]) -> None:
        """Look at a lane and the jobs that it has."""
        beats, now, patience = self._beats.get(lane, {}), time.monotonic(), self._patience
        if not beats:
            return
        signs = self._signs[lane]
        ticks = {rank: beat.ticks for rank, beat in beats.items()}
        # A lane that waits for the search computes nothing, and only resumable jobs count their batches.
        idle = all(entry.decision is not None or not entry.job.resumable for entry in entries)
        if ticks != signs.ticks or idle:
            signs.ticks, signs.moved = ticks, now
        silent = max(beats.values(), key=lambda beat: now - beat.at)
        quiet = max(now - silent.at, now - signs.moved)
        what = "is silent" if now - silent.at > now - signs.moved else "computes nothing"
        names = ", ".join(entry.job.id for entry in entries)
        text = f"{names}: process {silent.pid} of {lane} {what} for {quiet:.0f} s"
        if quiet >= patience.kill and not signs.killed:
            signs.killed = True
            trials = "its trial continues" if len(entries) == 1 else "its trials continue"
            self._notices.append(f"{text}; it is ended, and {trials} from the last checkpoint")
            for beat in beats.values():
                _end_process(beat)
        elif quiet >= patience.warn and not signs.warned:
            signs.warned = True
            self._notices.append(f"{text}; after {patience.kill:.0f} s it is ended (sweep.hang_seconds)")
        elif quiet < patience.warn and signs.warned:
            signs.warned = False
            self._notices.append(f"{names}: {lane} goes on")

    def _begin(self, entry: _Entry, lane: str) -> None:
        self._lanes[lane] = 0
        self._renewed.discard(lane)
        entry.lane, self._signs[lane] = lane, _Signs()
        entry.progress["state"] = "running"

    def _take(self, lane: str, pack: str | None = None) -> Job[Any, Any] | None:
        for job_id in list(self._queue):
            entry = self._entries[job_id]
            isolated = entry.setbacks > 1 and bool(entry.job.pack)
            job = replace(entry.job, pack="") if isolated else entry.job
            if pack is not None and self._has_its_share(lane, pack):
                return None
            elif job.lane in (None, lane) and pack in (None, job.pack):
                self._queue.remove(job_id)
                self._begin(entry, lane)
                entry.isolated = isolated
                return job
        return None

    def _has_its_share(self, lane: str, pack: str) -> bool:
        """Return whether a lane has as many of the open jobs that share batches as each lane should have."""
        open_jobs = [one for one in self._entries.values() if one.job.pack == pack and not one.done]
        mine = [one for one in open_jobs if one.lane == lane]
        return len(mine) * max(1, len(self._lanes)) >= len(open_jobs)

    def _push(self, entry: _Entry, event: Event) -> None:
        entry.pushed += 1
        entry.events.append(replace(event, number=entry.pushed))
        entry.changed.set()

    def _end(self, entry: _Entry, event: Event) -> None:
        if entry.done:
            return
        # It may end while it waits, if the only lane that may take it can't be started.
        with suppress(ValueError):
            self._queue.remove(entry.job.id)
        entry.last = event
        entry.ended.set()
        # A job that a full disk ends has not failed: the next command continues it.
        state = "interrupted" if event.fatal else event.kind
        stopped = entry.stop_at is not None and event.kind == "final"
        entry.progress["state"] = "stopped" if stopped else state
        self._push(entry, event)


def _decide(entry: _Entry, verdict: Verdict) -> None:
    if entry.decision is not None and not entry.decision.done():
        entry.decision.set_result(verdict)
    entry.decision = None


async def _lost(reason: str, beats: Collection[Beat]) -> str:
    """Return a text that names the lost node, if a lane ended because of that; otherwise an empty text."""
    deadline = time.monotonic() + (SURE_SECONDS if reason == UNREACHABLE else 0.0)
    while not (gone := _dead_nodes(beats)) and time.monotonic() < deadline:
        await asyncio.sleep(1.0)
    if gone:
        return f"{NODE_LOST} ({', '.join(gone)})"
    return reason if reason == NODE_LOST else ""


def _dead_nodes(beats: Collection[Beat]) -> list[str]:
    """Return the addresses of the workers' nodes that are no longer alive."""
    import ray

    if not ray.is_initialized():
        return []
    dead = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]}
    return sorted({dead[beat.node] for beat in beats if beat.node in dead})


def _end_process(beat: Beat) -> None:
    """Kill a worker from another process on its node: a stopped process does not receive calls."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(beat.pid)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

"""Show the progress of a command: its stages, a bar for each job, and the latest losses.

In a terminal this is one live display at the bottom: the stage that runs, and below it a bar for each job.
What is done is a line above it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from rayft.flow.console import terminal
from rayft.report.text import human_seconds

__all__ = ["Display"]

AT_WORK = {"score": "answering", "analyse": "measuring"}
"""Kind of a job → what is shown while it runs. The bars of these jobs disappear at their end."""
WIDE = 120
"""Columns of a terminal from which bars and elapsed times are shown beside the numbers."""
POLL_SECONDS = 0.5
"""Time between two looks at the jobs."""
WORTH_SAYING = 20.0
"""Seconds from which a job that is not a training gets a line in a log."""
STATES = {
    "queued": "waiting",
    "running": "training",
    "final": "done",
    "stopped": "stopped early",
    "interrupted": "interrupted",
}


class Display:
    """Shows stages and bars in a terminal, or a plain line for each change in a log.

    Args:
        console: where to print; the terminal if not given.

    Attributes:
        timings: stage → seconds.
        undone: what failed after the results were saved, and is left to the next run of the command.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or terminal()
        self.timings: dict[str, float] = {}
        self.undone: list[str] = []
        self._live = self.console.is_terminal
        wide = self.console.width >= WIDE
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            *((BarColumn(bar_width=24),) if wide else ()),
            TextColumn("{task.fields[note]}", markup=False),
            *((TimeElapsedColumn(),) if wide else ()),
            console=self.console,
            transient=True,
        )
        self._planned: tuple[str, ...] = ()
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}
        self._noticed = 0

    def plan(self, *stages: str) -> None:
        """Set the stages that follow, so that the live display shows how many there are.

        Args:
            stages: how their names begin, in their order. One that does not come is passed over.
        """
        self._planned = stages

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show a stage of the flow for the length of a block, and keep its seconds in `timings`."""
        started = time.monotonic()
        if not self._live:
            self.console.print(f"{name} …", highlight=False)
        with self._shown(), self._row(name):
            try:
                yield
            finally:
                self.timings[name] = self.timings.get(name, 0.0) + time.monotonic() - started
        mark = "✓" if self._live else " "
        self.console.print(f"{mark} {name}: {self.timings[name]:.1f} s", style="dim", highlight=False)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Show the live display for the length of a block, unless it is shown already or this is a log."""
        if not self._live or self._progress.live.is_started:
            yield
            return
        with self._progress:
            yield

    @contextmanager
    def _row(self, name: str) -> Iterator[None]:
        """Show a stage in the live display: as a bar over the planned stages if it is one of them."""
        place = next((at for at, start in enumerate(self._planned) if name.startswith(start)), None)
        of = "" if place is None else f"stage {place + 1} of {len(self._planned)}"
        total = None if place is None else len(self._planned)
        task = self._progress.add_task(name, total=total, completed=place or 0, note=of)
        try:
            yield
        finally:
            self._progress.remove_task(task)

    @contextmanager
    def watch(self, broker: Any, names: Callable[[str], str] = str) -> Iterator[None]:
        """Show the jobs of a broker for the length of a block.

        Args:
            broker: the broker, an actor of Ray.
            names: id of a job → the name that is shown.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._follow, args=(broker, names, done), daemon=True)
        with self._shown():
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
                for task in self._tasks.values():
                    self._progress.remove_task(task)
                self._tasks.clear()

    def say(self, text: str) -> None:
        """Print a line unchanged: brackets and colons in it are not markup."""
        self.console.print(f"  {text}", highlight=False, markup=False, emoji=False)

    def _follow(self, broker: Any, names: Callable[[str], str], done: threading.Event) -> None:
        over = False
        while not over:
            # One more round at the end prints the last notices of jobs.
            over = done.wait(POLL_SECONDS)
            try:
                jobs, notices = ray.get([broker.snapshot.remote(), broker.notices.remote(self._noticed)])
            except ray.exceptions.RayError:
                # The cluster is shutting down. The error of whoever waits for a result gives the reason.
                return
            self._noticed += len(notices)
            for text in notices:
                self.say(text)
            for job in jobs:
                self._update(names(job["id"]), job)

    def _update(self, name: str, job: dict[str, Any]) -> None:
        if job.get("state") == "final" and job["kind"] in AT_WORK:
            if name in self._tasks:
                self._progress.update(self._tasks[name], visible=False)
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=None, note="")
        number = self._tasks[name]
        self._progress.update(number, total=job.get("steps"), completed=job.get("step", 0))
        # The bars are kept in a log too, although nobody sees them: they estimate the time that is left.
        left = next(task for task in self._progress.tasks if task.id == number).time_remaining or 0.0
        note = _note(job, left)
        self._progress.update(number, note=note)
        if self._live:
            return
        if job["kind"] in AT_WORK:
            # One line, when it is known how long they take, if that is long.
            if name not in self._said and left > WORTH_SAYING:
                self._said[name] = note
                self.say(f"{name}: {note}")
            return
        # A log gets a line for each evaluation and each change of state.
        key = f"{job.get('state')} {job.get('val_loss')}"
        if self._said.get(name) != key:
            self._said[name] = key
            self.say(f"{name}: {note}")


def _note(job: dict[str, Any], left: float) -> str:
    """Return the state of a job in words.

    Args:
        job: as the broker describes it.
        left: estimate of the seconds until it ends; 0 if there is none.
    """
    state = str(job.get("state"))
    if job["kind"] in AT_WORK:
        rest = f", {human_seconds(left)} left" if left else ""
        return {"running": AT_WORK[job["kind"]] + rest, "queued": "waiting"}.get(state, state)
    parts = [f"step {job.get('step', 0)}", STATES.get(state, state)]
    if state == "running" and left:
        parts.append(f"{human_seconds(left)} left")
    if "train_loss" in job:
        parts.append(f"loss {job['train_loss']:.3f}")
    if "val_loss" in job:
        parts.append(f"val {job['val_loss']:.3f}")
    if state == "running" and "tokens_per_second" in job:
        parts.append(f"{job['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)

"""A trial of Ray Tune, which waits for what lanes report of it. It has a process of its own.

As many of these processes run as there are trials at the same time, so this module imports nothing that is
large: neither torch nor the modules of requests and results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import tune

from rayft.sweep.entrance import Entrance
from rayft.sweep.jobs import Job
from rayft.train.checkpoint_folder import last_curve

__all__ = ["Evaluation", "Start", "TrialActor"]


class Evaluation(NamedTuple):
    """What Tune is told of a trial."""

    step: int
    val_loss: float
    done: bool


@dataclass(frozen=True)
class Start:
    """How a trial begins."""

    job: Job[Any, Any]
    checkpoint: Path
    """Where the trial has its checkpoints, from which it goes on."""
    over: Sequence[Evaluation] = ()
    """All evaluations of a trial that ended in an earlier sweep, so that nothing is left to train."""
    keeps_best: bool = False
    """Whether the trial keeps the weights of its best evaluation, and not of the last."""


class TrialActor(tune.Trainable):
    """A Tune trial, which waits for a lane's reports."""

    _seen = 0
    """Number of the last event that was received."""
    _least = math.inf
    """The least loss, if the trial keeps its best weights."""

    def setup(self, config: dict[str, Any], *, entrance: Entrance | None = None) -> None:
        """Queue the trial, or prepare to replay it."""
        assert entrance is not None
        self._entrance = entrance
        self._begin(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in the same process, which takes milliseconds."""
        self._begin(new_config["trial"])
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation."""
        if self._replay:
            found = self._replay.pop(0)
        else:
            event: Any = ray.get(self._entrance.broker.next_event.remote(self._start.job.id, self._seen))
            self._seen = event.number
            # To Tune, a trial that failed has ended too, so it prints no traceback; the search reads the
            # reason.
            loss = event.metrics.get("val_loss", math.nan)
            found = Evaluation(event.step, loss, done=event.kind != "report")
        if self._start.keeps_best and not math.isnan(found.val_loss):
            # The trial is as good as the weights that it keeps.
            self._least = min(self._least, found.val_loss)
            found = found._replace(val_loss=self._least)
        return found._asdict()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: the lane saves the trial's checkpoint."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing: the lane resumes the trial."""

    def _begin(self, start: Start) -> None:
        self._start, self._replay = start, [*start.over]
        self._seen, self._least = 0, math.inf
        if not start.over:
            # A checkpoint's lane reports the evaluation of the checkpoint's own step again.
            curve = last_curve(start.checkpoint)
            self._replay = [Evaluation(step, loss, done=False) for step, loss in curve]
            # If a process before this one has died, the job has been submitted, and may have ended.
            self._entrance.submit([start.job], again=False)

"""The job of a trial: what a search asks a lane to train.

The search's own processes make and read it, so this module imports nothing that trains.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rayft.identity import UNKNOWN, Identity
from rayft.sweep.rehearsal import end_rehearsal
from rayft.sweep.result import trial_folder
from rayft.tracking.base import TrackerSpec
from rayft.train.checkpoint_folder import checkpoints, is_portable
from rayft.train.run import Placement, RunConfig, why_alone

if TYPE_CHECKING:
    from rayft.sweep.lane import Lane
    from rayft.sweep.result import TrialResult

__all__ = ["TrainRequest", "tracking_key"]


@dataclass(frozen=True)
class TrainRequest:
    """Train a run, as a trial of a sweep or alone."""

    kind: ClassVar[str] = "train"
    resumable: ClassVar[bool] = True

    key: str
    """Id of the job, and name of the trial's folder."""
    name: str
    run: RunConfig
    output: str
    """Folder of the sweep."""
    evaluate_at: tuple[int, ...]
    """Steps after which the search needs a validation loss."""
    tracker: TrackerSpec | None = None
    parent: str | None = None
    """Tracked run whose child the trial's tracked run is."""
    expected: Identity = UNKNOWN
    """Identity of data and base, as the driver has read them."""
    packs: bool = False
    """Whether it may share a lane's steps with other trials of the sweep."""
    placement: Placement | None = None
    """How steps use the device, if an earlier group of workers has found out."""

    @property
    def pack(self) -> str:
        """What trials have in common that share steps; empty if this one shares none."""
        if not self.packs or why_alone(self.run):
            return ""
        left = checkpoints(trial_folder(self.output, self.key) / "checkpoint")
        if left and not is_portable(left[0].place):
            # DeepSpeed's files, which an earlier version wrote, fit an engine of the run's own.
            return ""
        shared = self.run.model_dump(mode="json", include={"model", "data", "scale", "evaluate"})
        return json.dumps(shared, sort_keys=True)

    @property
    def identity(self) -> Identity:
        """What the result will follow from."""
        return self.expected.model_copy(update={"config": self.run.hash})

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder of the sweep."""
        return (Path(self.output),)

    def __call__(self, lane: Lane) -> TrialResult | None:
        """Train, and write result.json (all workers call it); the first worker returns the result.

        Raises:
            RayftError: as `Trainer.fit`.
            NewGroupError: if a step did not fit into the memory of a device, and other workers may wait for
                this one; the new group goes on with less at a time.
        """
        from rayft.sweep.trial import TrialCourse
        from rayft.train.course import drive

        started, fresh = time.perf_counter(), not lane.loaded
        session = lane.session(self.run, self.expected)
        end_rehearsal()
        trial = TrialCourse(self, lane, session, time.perf_counter() if fresh else started)
        return drive(trial.course(), trial.trainer.answer)


def tracking_key(key: str, identity: Identity) -> str:
    """Return the key of a tracked run, which depends on the sweep, the data and the base."""
    suffix = identity.sweep or (identity.inputs if identity.data else "")
    return f"{key}-{suffix}" if suffix else key

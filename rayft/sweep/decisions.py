"""ASHA's rungs, at which trials are compared, and the log of its decisions.

ASHA (Li et al. 2020, arXiv:1810.05934) is asynchronous: a decision depends on the evaluations that came
before. So each decision is written to a file, in the order in which the search made it, before the trial
learns of it. A sweep that continues replays the file to ASHA and so makes the same decisions, whatever is
trained again.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rayft.files import room_on
from rayft.sweep.space import SweepConfig

__all__ = ["EVENTS_FILE", "Decision", "EventLog", "rungs"]

EVENTS_FILE = "events.jsonl"
"""File in a sweep's folder: a `Decision` per line, in order."""


@dataclass(frozen=True)
class Decision:
    """The search's decision on an evaluation."""

    trial: str
    """Key of the trial."""
    step: int
    val_loss: float
    go_on: bool


class EventLog:
    """The decisions of a sweep, in a file that is only appended to.

    Args:
        path: the file; it is created with the first decision.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.decisions: list[Decision] = []
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            # A line that can't be read is skipped, and its evaluation is decided anew.
            with suppress(ValueError, TypeError):
                self.decisions.append(Decision(**json.loads(line)))
        self._known = {(one.trial, one.step): one for one in self.decisions}
        self._end = len(whole)

    def find(self, trial: str, step: int) -> Decision | None:
        """Return the decision at a step of a trial, or None."""
        return self._known.get((trial, step))

    def append(self, decision: Decision) -> None:
        """Write a decision; when this returns, it is on the disk.

        Raises:
            DiskFullError: if there is no space.
        """
        with room_on(self._path.parent), self._path.open("ab") as file:
            # Removes an incomplete line that a crash has left.
            file.truncate(self._end)
            line = json.dumps(asdict(decision)).encode() + b"\n"
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(line)
        self.decisions.append(decision)
        self._known[decision.trial, decision.step] = decision


def rungs(sweep: SweepConfig, steps: int) -> list[int]:
    """Return the steps at which a trial is compared: grace, grace·reduction, … below the last step."""
    found, step = [], sweep.grace
    while step < steps:
        found.append(step)
        step *= sweep.reduction
    return found

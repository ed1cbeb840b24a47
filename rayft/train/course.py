"""A run's course: what it asks for on its way (a step, a loss, whether it may continue), and its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from rayft.data.pack import Row

__all__ = [
    "Asked",
    "Clock",
    "Course",
    "CrowdedError",
    "HalfDoneError",
    "Part",
    "Question",
    "Step",
    "TrainResult",
    "Validation",
    "drive",
    "random_state",
]


class CrowdedError(Exception):
    """A packed run has to go on without some of the others, for which there is no room beside it.

    It goes on from its last checkpoint. If it was asking for a step, it saves one first.

    Attributes:
        intact: whether its weights and moments are those of its last step.
    """

    def __init__(self, reason: str, *, intact: bool) -> None:
        super().__init__(reason)
        self.intact = intact


class HalfDoneError(torch.OutOfMemoryError):
    """An optimizer step ran out of memory when it had begun to change parameters, which can't be used now."""


class Clock:
    """Counts the seconds that a device spends on a run.

    Runs that take their steps together stop it while they wait, and add to it their share of what is done for
    all of them. So the seconds of such runs add up to those of the device.

    Args:
        started: when the device began, by `time.perf_counter`; by default now.
    """

    def __init__(self, started: float | None = None) -> None:
        self._counted = 0.0
        self._since: float | None = time.perf_counter() if started is None else started

    def __call__(self) -> float:
        """Return the seconds so far."""
        return self._counted + (0.0 if self._since is None else time.perf_counter() - self._since)

    def stop(self) -> None:
        """Count no more."""
        self._counted, self._since = self(), None

    def go_on(self) -> None:
        """Count again, unless it does."""
        if self._since is None:
            self._since = time.perf_counter()

    def add(self, seconds: float) -> None:
        """Count some seconds more."""
        self._counted += seconds


@dataclass(frozen=True)
class Step:
    """An optimizer step that a run asks for; the answer returns its `StepResult` once it is taken (`Later`).

    If there is not enough memory, a `torch.OutOfMemoryError` is thrown into the course, or a `CrowdedError`.
    """

    engine: Any
    """The run's engine, or its slot among packed runs."""
    share: Sequence[Sequence[Row]]
    """Rows of each of this worker's micro-batches; of a packed run, all rows together."""
    lr: float
    random: torch.Tensor = field(repr=False)
    """Random state of the run's device, with which the step begins."""
    awaited: bool = False
    """Whether the run needs the numbers before it asks for another step."""

    def padding(self, tokens: int) -> float:
        """Return the share of padding in batches of some tokens that have these rows."""
        return 1 - sum(len(row) for rows in self.share for row in rows) / tokens


@dataclass(frozen=True)
class Validation:
    """The validation loss of a run's present weights (nats per target), a float."""

    engine: Any
    """As in `Step`."""


@dataclass(frozen=True)
class Question:
    """Whether a run may continue after an evaluation; the answer is a bool, the same on all workers."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run. Fields with a default may be missing in files that older versions wrote."""

    finished: bool
    """False if the reporter stopped the run early."""
    steps: int
    val_loss: float
    """Of the weights that were kept."""
    val_curve: list[tuple[int, float]]
    """(step, nats per completion token)."""
    train_curve: list[tuple[int, float]] = field(default_factory=list)
    trainable: int = 0
    """Number of values that train at the same time, at most: in an annealed run, those of its first phase."""
    parameters: int = 0
    """Number of values stored in the artifact."""
    rank: int | None = None
    """Rank of the saved adapter; None if what was saved has no rank."""
    bytes: int = 0
    """Size of the weights on disk."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time went: `train` and `evaluate` include the time before the run was resumed, `overhead` and
    `total` count from then on. Of what runs did together, it is the run's share. A trial's result also has
    `waiting`, the time that it waited for ASHA, in which the other trials of its batch may have gone on."""
    peak_memory: int = 0
    """Bytes: the resident set of the process on a CPU, the memory allocated on the device on a GPU. 0 if the
    run shared its steps with others, whose memory can't be told from its own."""
    tokens_per_second: float = 0.0
    """Its own tokens, by the duration of its steps. Those of runs that share their steps add up."""
    folder: str = ""
    content_hash: str = ""
    """Of the saved adapter; empty if a whole model was saved."""
    start: str = ""
    """Content hash of the adapter that the run started from; empty if it started from fresh adapters."""
    kept_step: int | None = None
    """The step whose weights were kept; None if they are the last ones."""
    placement: dict[str, int] = field(default_factory=dict)
    """How the last step used its device: the fields of a `Placement`."""


Asked = Step | Validation | Question
"""What a course asks for."""
Course = Generator[Asked, Any, TrainResult]
"""A run, from its start or its last checkpoint to its result."""
ReturnT = TypeVar("ReturnT")
Part = Generator[Asked, Any, ReturnT]
"""A part of a course."""


def drive(course: Generator[Asked, Any, ReturnT], answer: Callable[[Asked], Any]) -> ReturnT:
    """Run a course, or what goes on around one, to its end.

    Args:
        course: yields what it asks for.
        answer: answers it; a `torch.OutOfMemoryError` that it raises is thrown into the course.
    """
    value: Any = None
    failure: torch.OutOfMemoryError | None = None
    try:
        while True:
            asked = course.send(value) if failure is None else course.throw(failure)
            failure = None
            try:
                value = answer(asked)
            except torch.OutOfMemoryError as error:
                # A new error, because the old one refers to all that did not fit.
                failure = type(error)(str(error))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        course.close()


def random_state(device: str) -> torch.Tensor:
    """Return the random state of a device."""
    return torch.cuda.get_rng_state(device) if device.startswith("cuda") else torch.get_rng_state()

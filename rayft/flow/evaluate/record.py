"""What an evaluation found, as `rayft eval --out` saves it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from rayft import __version__
from rayft.config import Record
from rayft.errors import ReportError
from rayft.evaluate.compare import paired
from rayft.report.record import Score

__all__ = [
    "Answer",
    "Difference",
    "Evaluation",
    "Measure",
    "TargetResult",
    "check_replaceable",
    "differences",
]


class Answer(Record):
    """One question, and what was answered."""

    question: str
    wanted: str
    """The right answer."""
    got: str
    """What the target answered."""
    score: float
    """From 0 to 1; NaN for a task none of whose metrics is a score of single questions."""
    task: str = ""
    """The task of lm-evaluation-harness that asks; empty on data."""


class Measure(Record):
    """One score of one target."""

    task: str
    """Part of the data (`val`, `test`), or a task of lm-evaluation-harness."""
    metric: str
    """Kind of the scorer, or a metric of the task with its filter."""
    score: Score
    values: tuple[float, ...] = ()
    """Score of each question, in the order of the data; empty for a metric that is not a mean of them."""


class TargetResult(Record):
    """What was found of one target."""

    name: str
    content: str = ""
    """Content hash of the adapter; empty for a model, or if a server does not say it. A server's adapter at a
    lower rank has that of the whole adapter, and the rank, such as `@r4`."""
    parent: str = ""
    """Content hash of the adapter that it was squeezed from; empty if none, or if unknown."""
    base: str = ""
    """Fingerprint of the weights of the base, or of the model; empty if a server does not say it."""
    measures: tuple[Measure, ...] = ()
    loss: float | None = None
    """Mean negative log-likelihood of the right answers' tokens (nats); None on tasks."""
    problem: str = ""
    """For how many answers the scorer raised an error, and the first of these; empty if for none."""
    answers: tuple[Answer, ...] = ()
    """Of the data's questions, or of each task's, in their order."""


class Difference(Record):
    """The score of the first target minus that of the second, on the same questions."""

    task: str
    metric: str
    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    p_value: float
    """Probability of a difference at least this large if the targets were equally good; two-sided."""


class Evaluation(Record):
    """What an evaluation found."""

    made_by: Literal["rayft eval"] = "rayft eval"
    rayft: str = __version__
    base: str = ""
    """Name of the base, or URL of the server."""
    data: str = ""
    """Digest of the data and of its scorer; empty on tasks."""
    targets: tuple[TargetResult, ...]
    differences: tuple[Difference, ...] = ()
    """Of two targets."""


def differences(targets: Sequence[TargetResult]) -> tuple[Difference, ...]:
    """Return the differences of two targets in the scores that both have question by question."""
    if len(targets) != 2:
        return ()
    found = []
    for one, other in product(targets[0].measures, targets[1].measures):
        same = (one.task, one.metric) == (other.task, other.metric)
        if same and one.values and len(one.values) == len(other.values):
            both = paired(one.values, other.values)
            found.append(
                Difference(
                    task=one.task,
                    metric=one.metric,
                    value=both.difference,
                    low=both.ci_low,
                    high=both.ci_high,
                    p_value=both.p_value,
                )
            )
    return tuple(found)


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Check that a file is no user's file, and no other evaluation's unless it may be overwritten.

    Raises:
        ReportError: if it is one.
    """
    if not path.exists():
        return
    try:
        Evaluation.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ReportError(
            f"{path} was not written by `rayft eval`, and stays; choose another file with --out"
        ) from error
    if not overwrite:
        raise ReportError(f"{path} holds an evaluation; choose another file, or replace it with --overwrite")

"""Evaluations of a sweep's adapters by `rayft eval`: kept in the sweep's folder, and shown in its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from rayft.config import Record
from rayft.report.record import Score
from rayft.report.text import difference_text, loss_text, score_text

__all__ = [
    "FOLDER",
    "EvaluatedDifference",
    "EvaluatedScore",
    "EvaluationGroup",
    "SavedEvaluation",
    "SavedEvaluations",
    "evaluation_groups",
]

FOLDER = "evaluations"
"""Folder of the evaluations in a sweep's folder, a JSON file for each."""


class EvaluatedScore(Record):
    """A score of a target."""

    target: str
    """What the user called it, such as `runs/mine@r4` or `base`."""
    task: str
    """Part of the data (`val`, `test`), or a task of lm-evaluation-harness; empty if only texts were read."""
    metric: str
    """Kind of the scorer, or metric of the task; empty if only texts were read."""
    score: Score | None = None
    """Mean and interval, whose ends are NaN for a metric that has none; None if only texts were read."""
    loss: float | None = None
    """Mean negative log-likelihood of the right answers' tokens (nats); None on tasks."""


class EvaluatedDifference(Record):
    """The score of a target minus that of another, on the same questions."""

    target: str
    against: str
    task: str
    metric: str
    difference: Score
    p_value: float
    """Probability of a difference at least this large if both were equally good; two-sided."""


class SavedEvaluation(Record):
    """What an evaluation found, without the answers."""

    format: Literal[1] = 1
    """Version of this format."""
    date: str
    """When it ended, ISO 8601."""
    base: str
    """Name of the base, or URL of the server."""
    data_digest: str = ""
    """Digest of the data and of its scorer; empty on tasks."""
    how: dict[str, str] = {}
    """Settings that the user has chosen: name → value."""
    scores: tuple[EvaluatedScore, ...]
    differences: tuple[EvaluatedDifference, ...] = ()
    """Of two targets."""

    def save(self, sweep: Path, key: str) -> Path:
        """Write it into a sweep's folder, whole or not at all.

        Args:
            sweep: the sweep's folder.
            key: identifies the evaluation; the same evaluation again replaces the earlier one.
        """
        return self.write(sweep / FOLDER / f"{key}.json")


@dataclass(frozen=True)
class SavedEvaluations:
    """The evaluations in a sweep's folder."""

    found: tuple[SavedEvaluation, ...] = ()
    """The oldest first."""
    unreadable: tuple[str, ...] = ()
    """Names of files that are damaged, or of another version."""

    @classmethod
    def find(cls, sweep: str | Path) -> SavedEvaluations:
        """Read the evaluations in a sweep's folder; there may be none."""
        found, unreadable = [], []
        for path in sorted((Path(sweep) / FOLDER).glob("[!.]*.json")):
            try:
                found.append(SavedEvaluation.model_validate_json(path.read_bytes()))
            except (OSError, ValidationError):
                unreadable.append(f"{FOLDER}/{path.name}")
        return cls(tuple(sorted(found, key=lambda one: one.date)), tuple(unreadable))


@dataclass(frozen=True)
class EvaluationGroup:
    """An evaluation as text, for tables."""

    heading: str
    """When it was made, and how."""
    scores: Sequence[tuple[str, str, str, str, str]]
    """Target, what it was scored on, score, number of questions, loss."""
    differences: Sequence[tuple[str, str, str, str, str]]
    """Target, what it is compared with, on what, difference, p-value."""


def evaluation_groups(evaluations: SavedEvaluations, data_digest: str) -> list[EvaluationGroup]:
    """Return the evaluations as text.

    Args:
        evaluations: of a sweep.
        data_digest: of the sweep's data; scores on other data are marked.
    """
    groups = []
    for one in evaluations.found:
        other = "on other data than the sweep's" if one.data_digest not in ("", data_digest) else ""
        chosen = ", ".join(f"{name} {value}" for name, value in one.how.items())
        place = f"{'server' if '://' in one.base else 'base'} {one.base}"
        parts = (one.date.replace("T", " ")[:16], place, chosen, other)
        scores = [
            (
                row.target,
                _of(row),
                _score(row.score),
                str(row.score.n) if row.score else "–",
                loss_text(row.loss),
            )
            for row in one.scores
        ]
        differences = [
            (row.target, row.against, _of(row), difference_text(row.difference), f"{row.p_value:.3g}")
            for row in one.differences
        ]
        groups.append(EvaluationGroup(" · ".join(filter(None, parts)), scores, differences))
    return groups


def _of(row: EvaluatedScore | EvaluatedDifference) -> str:
    return f"{row.task}, {row.metric}" if row.metric else row.task or "–"


def _score(score: Score | None) -> str:
    return f"{score.value:.4g}" if score is not None and not math.isfinite(score.low) else score_text(score)

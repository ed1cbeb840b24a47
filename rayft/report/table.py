"""The results as lines of one table: baselines first, then trials, then squeezed adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rayft.report.record import Score, SweepRecord, TrialRecord

__all__ = ["TableRow", "pareto", "shown_names", "table_rows"]


@dataclass(frozen=True)
class TableRow:
    """One line; None where something was not measured or has no meaning."""

    name: str
    kind: Literal["baseline", "trial", "squeezed"]
    method: str
    test: Score | None
    val_score: float | None
    val_loss: float | None
    parameters: int | None
    bytes: int | None
    seconds: float | None
    memory: int | None
    status: str
    rank: int | None = None
    winner: bool = False
    """Whether it is the winning trial."""
    ship: bool = False
    """Whether it is what to serve."""


def table_rows(record: SweepRecord) -> list[TableRow]:
    """List a sweep's results; trials by test score, best first, those without one last."""
    ship = record.winner.ship if record.winner else None
    winner = record.winner.trial if record.winner else None
    methods = {trial.id: trial.method for trial in record.trials}
    found = [
        TableRow(
            base.name, "baseline", "baseline", base.test, base.val_score, None, None, None, None, None, ""
        )
        for base in record.baselines
    ]
    for trial in sorted(record.trials, key=_by_score):
        found.append(
            TableRow(
                trial.id, "trial", trial.method, trial.test, trial.val_score, trial.kept_val_loss,
                trial.trainable or None, trial.bytes or None, trial.seconds or None,
                trial.peak_memory_bytes, trial.status,
                trial.rank, trial.id == winner, trial.id == ship,
            )
        )  # fmt: skip
    for item in sorted(record.squeezed, key=lambda item: -item.rank):
        found.append(
            TableRow(
                item.name, "squeezed", methods.get(item.trial, item.trial), item.test, item.val_score,
                item.val_loss, item.parameters, item.bytes or None, item.seconds, None, item.how,
                item.rank, False, item.name == ship,
            )
        )  # fmt: skip
    return found


def shown_names(record: SweepRecord) -> dict[str, str]:
    """Return each result's name in a table: `t3@r4` is `@r4` if all are squeezed from the winner."""
    names = {row.name: row.name for row in table_rows(record)}
    if record.winner and {item.trial for item in record.squeezed} == {record.winner.trial}:
        names |= {item.name: item.name.removeprefix(item.trial) or item.name for item in record.squeezed}
    return names


def pareto(
    candidates: Sequence[TableRow], cost: Callable[[TableRow], float | None] = lambda row: row.bytes
) -> list[TableRow]:
    """Keep the rows that no other beats in both score and cost (bytes if not given), cheapest first."""
    front: list[TableRow] = []
    scored = [row for row in candidates if row.test and cost(row)]
    for row in sorted(scored, key=lambda row: (cost(row) or 0, -(row.test.value if row.test else 0.0))):
        if not front or (row.test and front[-1].test and row.test.value > front[-1].test.value):
            front.append(row)
    return front


def _by_score(trial: TrialRecord) -> tuple[bool, float, float]:
    loss = trial.kept_val_loss
    return (
        trial.test is None,
        -trial.test.value if trial.test else 0.0,
        loss if loss is not None and math.isfinite(loss) else math.inf,
    )

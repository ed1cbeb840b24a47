"""The record as rows of one table: baselines first, then trials, then what was squeezed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rayft.report.record import Score, SweepRecord, Trial

__all__ = [
    "Row",
    "human_bytes",
    "human_count",
    "human_seconds",
    "loss_text",
    "pareto",
    "row_names",
    "rows",
    "signed_text",
]


@dataclass(frozen=True)
class Row:
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


def rows(record: SweepRecord) -> list[Row]:
    """List what the sweep has to show; trials by test score, best first, those without one last."""
    ship = record.winner.ship if record.winner else None
    winner = record.winner.trial if record.winner else None
    methods = {trial.id: trial.method for trial in record.trials}
    found = [
        Row(base.name, "baseline", "baseline", base.test, base.val_score, None, None, None, None, None, "")
        for base in record.baselines
    ]
    for trial in sorted(record.trials, key=_by_score):
        found.append(
            Row(
                trial.id, "trial", trial.method, trial.test, trial.val_score, trial.last_val_loss,
                trial.trainable, trial.bytes or None, trial.seconds, trial.peak_memory_bytes, trial.status,
                trial.rank, trial.id == winner, trial.id == ship,
            )
        )  # fmt: skip
    for item in sorted(record.squeezed, key=lambda item: -item.rank):
        found.append(
            Row(
                item.name, "squeezed", methods.get(item.trial, item.trial), item.test, item.val_score,
                item.val_loss, item.parameters, item.bytes or None, item.seconds, None, item.how,
                item.rank, False, item.name == ship,
            )
        )  # fmt: skip
    return found


def row_names(record: SweepRecord) -> dict[str, str]:
    """Say how each row is called in a table; `t3@r4` is `@r4` if nothing but the winner can be meant."""
    names = {row.name: row.name for row in rows(record)}
    if record.winner and {item.trial for item in record.squeezed} == {record.winner.trial}:
        names |= {item.name: item.name.removeprefix(item.trial) or item.name for item in record.squeezed}
    return names


def _by_score(trial: Trial) -> tuple[bool, float, float]:
    loss = trial.last_val_loss
    return (
        trial.test is None,
        -trial.test.value if trial.test else 0.0,
        loss if loss is not None and math.isfinite(loss) else math.inf,
    )


def pareto(
    candidates: Sequence[Row], cost: Callable[[Row], float | None] = lambda row: row.bytes
) -> list[Row]:
    """Keep the rows that no other beats in both score and cost (bytes if not given), cheapest first."""
    front: list[Row] = []
    scored = [row for row in candidates if row.test and cost(row)]
    for row in sorted(scored, key=lambda row: (cost(row) or 0, -(row.test.value if row.test else 0.0))):
        if not front or (row.test and front[-1].test and row.test.value > front[-1].test.value):
            front.append(row)
    return front


def human_bytes(count: float | None) -> str:
    """Write a size in decimal units: 1.2 MB; `–` for None."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"), " ")


def human_count(count: float | None) -> str:
    """Write a count: 1.2M; `–` for None."""
    return _scaled(count, ("", "k", "M", "B", "T"), "")


def _scaled(value: float | None, units: Sequence[str], gap: str) -> str:
    if value is None:
        return "–"
    for unit in units[:-1]:
        # 999.6 would be written as 1000 of this unit.
        if abs(value) < 999.5:
            return (f"{value:.3g}" if value % 1 else f"{value:.0f}") + (gap if unit else "") + unit
        value /= 1000
    return f"{value:.3g}{gap}{units[-1]}"


def human_seconds(seconds: float | None) -> str:
    """Write a duration: 53 ms, 4.2 s, 3m 05s, 2h 10m; `–` for None."""
    if seconds is None:
        return "–"
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def loss_text(loss: float | None) -> str:
    """Write a loss: 1.234; `–` for None, `diverged` for NaN and Inf."""
    if loss is None:
        return "–"
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def signed_text(value: float, low: float, high: float, digits: int = 2) -> str:
    """Write a number with its interval and signs: +0.39 [+0.32, +0.46]; `–` for NaN, no interval of NaN."""
    if math.isnan(value):
        return "–"
    # Adding 0 makes −0 a 0.
    one, *ends = (f"{round(number, digits) + 0.0:+.{digits}f}" for number in (value, low, high))
    text = f"{one} [{', '.join(ends)}]" if math.isfinite(low) else one
    return text.replace("-", "−")

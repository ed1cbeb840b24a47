"""What a sweep found, as a record, a table for the terminal and one HTML file."""

from rayft.report.record import (
    Baseline,
    Command,
    Comparison,
    Exchange,
    MethodScore,
    Score,
    Served,
    Squeezed,
    SweepRecord,
    TrialRecord,
    Winner,
)

__all__ = [
    "Baseline",
    "Command",
    "Comparison",
    "Exchange",
    "MethodScore",
    "Score",
    "Served",
    "Squeezed",
    "SweepRecord",
    "TrialRecord",
    "Winner",
]

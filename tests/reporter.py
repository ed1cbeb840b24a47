"""A reporter that keeps what it receives."""

from __future__ import annotations

from collections.abc import Mapping

from rayft.train.trainer import Reporter

__all__ = ["RecordingReporter"]


class RecordingReporter(Reporter):
    """Keep all numbers and notes; never end a run."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.reported: list[tuple[int, dict[str, float]]] = []
        self.notes: list[str] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the numbers of a step."""
        self.logged.append((step, dict(metrics)))

    def report(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Keep the numbers of an evaluation."""
        self.reported.append((step, dict(metrics)))
        return True

    def note(self, text: str) -> None:
        """Keep a sentence."""
        self.notes.append(text)

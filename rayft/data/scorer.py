"""How good an answer is: reasoning-gym's own scorer, or an exact match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayft.data.example import Example
from rayft.data.gym import build_task

__all__ = ["Scorer"]


@dataclass
class Scorer:
    """Scores answers. It pickles: a process builds reasoning-gym's data set when it first needs it."""

    task: str = ""
    """reasoning-gym's task; empty for an exact match, spaces around and case aside."""
    params: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    strict: bool = True
    """Whether anything short of fully right counts as wrong."""
    failures: int = 0
    """How many answers made reasoning-gym's scorer raise; each of them scored 0."""
    _dataset: Any = field(default=None, repr=False, compare=False)

    def score(self, example: Example, answer: str, expected: str | None = None) -> float:
        """Score an answer from 0 to 1; spaces around it don't count.

        Args:
            example: what was asked.
            answer: what was answered.
            expected: the right answer of an exact match, where it differs from the example's own text.
        """
        answer = answer.strip()
        if not self.task:
            right = example.answer if expected is None else expected
            return float(answer.casefold() == right.strip().casefold())
        if self._dataset is None:
            self._dataset = build_task(self.task, self.params, seed=0, size=1)
        try:
            value = float(self._dataset.score_answer(answer=answer, entry=dict(example.entry or {})))
        except Exception:  # noqa: BLE001  (scorers parse what a model wrote and raise whatever that causes)
            self.failures += 1
            return 0.0
        return float(value >= 1.0) if self.strict else value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}

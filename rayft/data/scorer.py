"""Score answers, with reasoning-gym's own scorer or by an exact match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayft.data.example import Example
from rayft.data.gym import build_task

__all__ = ["Scorer"]


@dataclass
class Scorer:
    """Scores answers. It can be pickled: each process creates the data set when it first scores."""

    task: str = ""
    """Task of reasoning-gym; empty for an exact match that ignores case and surrounding whitespace."""
    params: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    strict: bool = True
    """Whether an answer that is only partly right scores 0."""
    failures: int = 0
    """Number of answers for which reasoning-gym's scorer raised an error. They scored 0."""
    _dataset: Any = field(default=None, repr=False, compare=False)

    def score(self, example: Example, answer: str, expected: str | None = None) -> float:
        """Return the score of an answer, from 0 to 1. Surrounding whitespace is ignored.

        Args:
            example: the example with the question.
            answer: the answer to score.
            expected: the right answer for an exact match, if it differs from the example's own text.
        """
        answer = answer.strip()
        if not self.task:
            right = example.answer if expected is None else expected
            return float(answer.casefold() == right.strip().casefold())
        if self._dataset is None:
            self._dataset = build_task(self.task, self.params, seed=0, size=1)
        try:
            value = float(self._dataset.score_answer(answer=answer, entry=dict(example.entry or {})))
        except Exception:  # noqa: BLE001  (scorers parse what a model wrote and may raise any error)
            self.failures += 1
            return 0.0
        return float(value >= 1.0) if self.strict else value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}

"""Score answers: with reasoning-gym's own scorer, by comparing texts, or with a function of the user's."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from rayft.data.answers import ANSWER_SCORES
from rayft.data.example import Example
from rayft.data.gym import build_task
from rayft.data.section import ScorerConfig
from rayft.errors import DataError

__all__ = ["Scorer", "scorer_of"]

UserFunction = Callable[[str, str, str], float]


@dataclass
class Scorer:
    """Scores answers. It can be pickled: each process makes what it needs when it first scores."""

    task: str = ""
    """Task of reasoning-gym; empty if answers are compared as `config` says."""
    params: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    strict: bool = True
    """Whether an answer to a task that is only partly right scores 0."""
    config: ScorerConfig = field(default_factory=ScorerConfig)
    """How answers are compared if there is no task."""
    code: str = ""
    """Hash of the file of the user's function; empty if there is none."""
    failures: int = 0
    """Number of answers for which the task's scorer or the function raised an error. They scored 0."""
    problem: str = ""
    """The first of these errors."""
    _used: Any = field(default=None, repr=False, compare=False)
    """The task's data set, or the function."""

    @property
    def identity(self) -> str:
        """What the scores depend on besides question and answer, as text; empty for an exact match or a task.

        The path of the function's file is left out, and its content counts.
        """
        if self.task or self.config == ScorerConfig():
            return ""
        config = self.config.moved("") if self.code else self.config
        return config.model_dump_json() + self.code

    def score(self, example: Example, answer: str, expected: str | None = None) -> float:
        """Return the score of an answer, from 0 to 1. Surrounding whitespace is ignored.

        Args:
            example: the example with the question.
            answer: the answer to score.
            expected: the right answer, if it differs from the example's own text.

        Raises:
            DataError: if the file of the user's function is missing, or has changed since the data was read.
        """
        answer, right = answer.strip(), (example.answer if expected is None else expected).strip()
        if not self.task and self.config.kind != "python":
            return ANSWER_SCORES[self.config.kind](answer, right, self.config)
        if self._used is None:
            self._used = self._prepared()
        try:
            return self._strict(example, answer) if self.task else self._checked(example, answer, right)
        except Exception as error:  # noqa: BLE001  (scorers parse what a model wrote and may raise any error)
            self.failures += 1
            self.problem = self.problem or f"{type(error).__name__}: {error}".splitlines()[0]
            return 0.0

    def _prepared(self) -> Any:
        if self.task:
            return build_task(self.task, self.params, seed=0, size=1)
        function, code = _load(self.config)
        if code != self.code:
            raise DataError(
                f"{self.config.file} has changed since the data was read: leave it alone while rayft runs, "
                "and run the command again"
            )
        return function

    def _strict(self, example: Example, answer: str) -> float:
        value = float(self._used.score_answer(answer=answer, entry=dict(example.entry or {})))
        return float(value >= 1.0) if self.strict else value

    def _checked(self, example: Example, answer: str, expected: str) -> float:
        value = float(self._used(answer, expected, example.question))
        if not 0 <= value <= 1:
            raise ValueError(f"it returned {value}, which is not from 0 to 1")
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_used": None}


def scorer_of(config: ScorerConfig) -> Scorer:
    """Return the scorer of a configuration, after checking that a function of the user's can be loaded.

    Raises:
        DataError: if it can't, with the reason.
    """
    return Scorer(config=config, code=_load(config)[1] if config.kind == "python" else "")


def _load(config: ScorerConfig) -> tuple[UserFunction, str]:
    """Run the file of the user's function; return the function, and a hash of the file."""
    path, name = Path(config.file).expanduser(), config.function.rpartition(":")[2]
    try:
        source = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"data.scorer.function: {path} can't be read ({error.strerror}); name a file with the function"
        ) from error
    code = hashlib.sha256(source).hexdigest()[:16]
    module = ModuleType(f"rayft_scorer_{code}")
    module.__file__ = str(path)
    # Dataclasses look up the module that they are defined in.
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102  (the user named the file)
    except (Exception, SystemExit) as error:
        raise DataError(
            f"data.scorer.function: {path} can't be run ({type(error).__name__}: {error}); correct it"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise DataError(
            f"data.scorer.function: {path} has no function '{name}'{f'; it has {known}' if known else ''}"
        )
    return function, code

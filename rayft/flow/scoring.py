"""The stages of a sweep as functions: score, and put in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import ray

from rayft.data.source import majority_answer
from rayft.errors import RayftError, TrainError
from rayft.evaluate.compare import interval
from rayft.flow.scores import ScoreStore, follows_from
from rayft.flow.sweep.preflight import Plan
from rayft.models.methods import method
from rayft.report.record import Score
from rayft.sweep.broker import Event, Job
from rayft.sweep.executor import Executor
from rayft.sweep.score import ScoreRequest
from rayft.sweep.tuner import Trial
from rayft.train.run import RunConfig

__all__ = [
    "Measured",
    "check_some",
    "marked",
    "outcome",
    "say_unscored",
    "score_all",
    "score_baselines",
    "score_trials",
]

STYLES = {"base": "as_is", "answer only": "answer_only", "few shot": "few_shot"}


@dataclass(frozen=True)
class Measured:
    """Scores of one adapter (or baseline): part → value of each example."""

    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    error: str = ""
    """Why it could not be scored."""

    def mean(self, part: str) -> float | None:
        """Give the mean of a part; None where it was not scored."""
        values = self.parts.get(part)
        return sum(values) / len(values) if values else None

    def score(self, part: str = "test") -> Score | None:
        """Give the mean of a part with its interval; None where it was not scored."""
        values = self.parts.get(part)
        if not values:
            return None
        low, high = interval(values)
        return Score(value=sum(values) / len(values), low=low, high=high, n=len(values))


def score_all(
    executor: Executor, requests: Mapping[str, ScoreRequest], store: ScoreStore | None = None
) -> dict[str, Measured]:
    """Score many at once (as many as there are lanes).

    What can't be scored says so in its `error`, and costs the others nothing.

    Args:
        executor: of the lanes.
        requests: name of what is scored → how.
        store: where scores are kept as they come, and found again; not at all where not given.
    """
    found, follows = _kept(requests, store) if store else ({}, {})
    todo = [name for name in requests if name not in found]
    executor.submit([Job.of(name, "score", requests[name]) for name in todo])
    waiting = {executor.broker.next_event.remote(name): name for name in todo}
    while waiting:
        (ready,), _ = ray.wait([*waiting], num_returns=1)
        name = waiting.pop(ready)
        found[name] = _measured(ray.get(ready))
        if store and name in follows and not found[name].error:
            store.keep(name, follows[name], found[name].parts)
    return {name: found[name] for name in requests}


def _kept(
    requests: Mapping[str, ScoreRequest], store: ScoreStore
) -> tuple[dict[str, Measured], dict[str, dict[str, str]]]:
    """Return the scores that are kept, and what each request follows from, as far as that is known."""
    found: dict[str, Measured] = {}
    follows: dict[str, dict[str, str]] = {}
    for name, request in requests.items():
        try:
            follows[name] = follows_from(request)
        except RayftError as error:
            found[name] = Measured(error=str(error))
            continue
        kept = store.find(name, follows[name], request.parts)
        if kept is not None:
            found[name] = Measured(kept)
    return found, follows


def check_some(scores: Mapping[str, Measured]) -> None:
    """Refuse to go on where nothing could be scored.

    Raises:
        TrainError: naming the first, and why.
    """
    if scores and all(measured.error for measured in scores.values()):
        name, measured = next(iter(scores.items()))
        raise TrainError(f"{name} can't be scored: {measured.error}")


def say_unscored(scores: Mapping[str, Measured], say: Callable[[str], None]) -> None:
    """Tell of each that could not be scored, and why."""
    for name, measured in scores.items():
        if measured.error:
            say(f"{name} can't be scored, and is left out: {measured.error.splitlines()[0]}")


def _measured(event: Event) -> Measured:
    event.raise_fatal()
    if event.kind != "final":
        return Measured(error=str(event.values.get("error", "it was interrupted")))
    return Measured(event.values["scores"])


def score_baselines(plan: Plan, executor: Executor, store: ScoreStore | None = None) -> dict[str, Measured]:
    """Score what is reached without training: the base, prompted three ways, and the majority answer.

    Raises:
        TrainError: if the base can't be scored in any way.
    """
    majority = majority_answer(plan.parts)
    scorer = plan.parts.scorer
    guessed = {
        part: [scorer.score(example, majority) for example in getattr(plan.parts, part)]
        for part in ("val", "test")
    }
    found = {}
    if plan.run.model.task == "causal_lm":
        requests = {
            name: ScoreRequest(
                run=plan.run.model_dump_json(),
                parts=("val", "test"),
                style=style,  # type: ignore[arg-type]
                expected=plan.identity,
            )
            for name, style in STYLES.items()
        }
        found = score_all(executor, requests, store)
        check_some(found)
    return {**found, "majority answer": Measured(guessed)}


def score_trials(
    plan: Plan, executor: Executor, trials: Sequence[Trial], store: ScoreStore | None = None
) -> dict[str, Measured]:
    """Score what each trial saved: finished ones on val and test, stopped ones on test alone.

    Raises:
        TrainError: if none of them can be scored.
    """
    requests = {}
    for trial in trials:
        if trial.result is None:
            continue
        run, adapter = outcome(trial.point.run, str(trial.result["folder"]))
        requests[trial.point.name] = ScoreRequest(
            run=run.model_dump_json(),
            parts=("val", "test") if trial.status == "finished" else ("test",),
            adapter=adapter,
            expected=plan.identity if adapter else plan.identity.of_data(),
        )
    found = score_all(executor, requests, store)
    check_some(found)
    return found


def marked(trials: Sequence[Trial], scores: Mapping[str, Measured]) -> list[Trial]:
    """Mark the trials whose adapter could not be scored as failed, with the reason."""
    return [
        replace(trial, error=f"can't be scored: {measured.error}; run the same command again")
        if (measured := scores.get(trial.point.name)) is not None and measured.error
        else trial
        for trial in trials
    ]


def outcome(run: RunConfig, folder: str) -> tuple[RunConfig, str | None]:
    """Say how what a run left is loaded: its base and the adapter, or the tuned model as a base alone."""
    if not method(run.method.name).saves_model:
        return run, folder
    return run.model_copy(update={"model": run.model.model_copy(update={"name": folder})}), None

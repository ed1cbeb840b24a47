"""Score adapters and baselines in lanes, and keep the scores so that nothing is scored twice.

A sweep keeps scores in `scores/<name>.json`: the score of each example, part by part, and what the scores
follow from. A kept score is used again only if all of that is the same: the content of the adapter, the base,
the data, how the base is loaded, and how answers are generated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from rayft.config import Record, in_one_line
from rayft.data.source import majority_answer
from rayft.errors import RayftError, TrainError
from rayft.evaluate.compare import interval
from rayft.flow.squeeze.make import SqueezedAdapter, targets
from rayft.flow.sweep.preflight import Plan
from rayft.models.identity import base_files
from rayft.models.methods import method
from rayft.peft.folder import load_adapter
from rayft.report.record import Score
from rayft.sweep.executor import Executor
from rayft.sweep.jobs import Job, Outcome
from rayft.sweep.score import ScoreRequest, sample
from rayft.sweep.search import Trial
from rayft.train.run import RunConfig

__all__ = [
    "Measured",
    "ScoreStore",
    "check_some",
    "follows_from",
    "marked",
    "outcome",
    "questions_text",
    "say_unscored",
    "score_all",
    "score_squeezed",
    "score_sweep",
    "score_trials",
]

Part = Literal["val", "test"]
STYLES = {"base": "as_is", "answer only": "answer_only", "few shot": "few_shot"}
"""Baseline → how its questions are put to the base."""
SETTINGS: Any = {
    "model": True,
    "data": True,
    "scale": True,
    "evaluate": {"max_new_tokens", "batch_size", "shots"},
}
"""Fields of a run that decide its scores."""


@dataclass(frozen=True)
class Measured:
    """Scores of one adapter, tuned model or baseline."""

    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Part of the data → score of each example."""
    error: str = ""
    """Why it could not be scored; empty if it was."""

    def mean(self, part: str) -> float | None:
        """Return the mean score of a part; None if the part was not scored."""
        values = self.parts.get(part)
        return sum(values) / len(values) if values else None

    def score(self, part: str = "test") -> Score | None:
        """Return the mean score of a part with its 95 % interval; None if the part was not scored."""
        values = self.parts.get(part)
        if not values:
            return None
        low, high = interval(values)
        return Score(value=sum(values) / len(values), low=low, high=high, n=len(values))


class _Kept(Record):
    """Content of a file of kept scores."""

    follows: Mapping[str, str]
    """What the scores follow from: name → hash or text."""
    parts: Mapping[str, tuple[float, ...]]
    """Part of the data → score of each example."""


class ScoreStore:
    """A folder of kept scores.

    Args:
        folder: the folder, which is made when the first scores are kept.
        say: called with a sentence for each file that can't be read.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say

    def find(
        self, name: str, follows: Mapping[str, str], parts: Sequence[str]
    ) -> dict[str, tuple[float, ...]] | None:
        """Return the scores that are kept under a name; None if it has to be scored.

        Args:
            name: of what is scored.
            follows: what the scores must follow from (`follows_from`).
            parts: the parts of the data that are needed.
        """
        place = self._place(name)
        try:
            kept = _Kept.model_validate_json(place.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            self._say(f"{name} is scored again: {place} is damaged ({in_one_line(error)})")
            return None
        if kept.follows != follows or not {*parts} <= kept.parts.keys():
            return None
        return {part: kept.parts[part] for part in parts}

    def keep(self, name: str, follows: Mapping[str, str], parts: Mapping[str, Sequence[float]]) -> None:
        """Keep scores under a name, in place of earlier ones.

        Args:
            name: of what was scored.
            follows: what the scores follow from (`follows_from`).
            parts: part of the data → score of each example.
        """
        found = {part: tuple(values) for part, values in parts.items()}
        _Kept(follows=dict(follows), parts=found).write(self._place(name))

    def _place(self, name: str) -> Path:
        return self._folder / (re.sub(r"[^\w.@+,:=-]", "-", name) + ".json")


def follows_from(request: ScoreRequest) -> dict[str, str]:
    """Return what the scores of a request follow from: name → hash or text.

    Raises:
        ArtifactError: if the adapter can't be read.
        ModelError: if the tuned model can't be read.
    """
    run = request.run
    if request.adapter is not None:
        content = load_adapter(request.adapter).content_hash
    else:
        # A tuned model is loaded as a base, so its content is that of the base's files.
        content = "" if request.expected.base else base_files(run.model).identity
    found = {
        "adapter": content,
        "base": request.expected.base,
        "data": request.expected.data,
        "style": request.style,
        "settings": json.dumps(run.model_dump(mode="json", include=SETTINGS), sort_keys=True),
    }
    return found if request.examples is None else {**found, "examples": str(request.examples)}


def score_all(
    executor: Executor,
    requests: Mapping[str, ScoreRequest],
    store: ScoreStore | None = None,
    begin: Callable[[Collection[str]], None] = lambda _: None,
) -> dict[str, Measured]:
    """Score in all lanes at once.

    What can't be scored gets an `error`; the rest is scored all the same.

    Args:
        executor: of the lanes.
        requests: name of what is scored → the request.
        store: where scores are kept as they arrive, and from where they are used again. Without it nothing
            is kept.
        begin: called with the names of the requests whose scores are not kept, if there are any.
    """
    found, follows = _kept(requests, store) if store else ({}, {})
    jobs = [
        Job.of(name, request, pack=request.pack) for name, request in requests.items() if name not in found
    ]
    if jobs:
        begin([job.id for job in jobs])
    for name, scored in executor.run(jobs):
        found[name] = _measured(scored)
        if store and name in follows and not found[name].error:
            store.keep(name, follows[name], found[name].parts)
    return {name: found[name] for name in requests}


def _kept(
    requests: Mapping[str, ScoreRequest], store: ScoreStore
) -> tuple[dict[str, Measured], dict[str, dict[str, str]]]:
    """Return the kept scores, and what the scores of each readable request follow from."""
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
    """Check that at least one of the scores could be measured.

    Raises:
        TrainError: if none could, with the reason of the first.
    """
    if scores and all(measured.error for measured in scores.values()):
        name, measured = next(iter(scores.items()))
        raise TrainError(f"{name} can't be scored: {measured.error}")


def say_unscored(scores: Mapping[str, Measured], say: Callable[[str], None]) -> None:
    """Report each name that could not be scored, with the reason, by calling `say`."""
    for name, measured in scores.items():
        if measured.error:
            say(f"{name} can't be scored, and is left out: {measured.error.splitlines()[0]}")


def _measured(scored: Outcome[dict[str, list[float]]]) -> Measured:
    return Measured(error=scored.error) if scored.result is None else Measured(scored.result)


def score_sweep(
    plan: Plan,
    executor: Executor,
    trials: Sequence[Trial],
    can_win: Sequence[Trial],
    store: ScoreStore | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Measured], dict[str, Measured]]:
    """Score the baselines and the trials (as `score_trials`), whose questions share batches.

    The baselines are the base, prompted in three ways, and the majority answer. On raw text there are none,
    and the scores of trials are empty.

    Args:
        plan: the sweep's.
        executor: of the lanes.
        trials: those that have ended.
        can_win: those of them that can win.
        store: as for `score_all`.
        say: called with how many questions the base answers, unless all its scores are kept.

    Returns:
        Name of a baseline → its scores, or an `error`; and what `score_trials` returns.

    Raises:
        TrainError: if none of the trials can be scored, or, if all have failed, not the base either.
    """
    base, requests = _base_requests(plan), _trial_requests(plan, trials, can_win)
    if not plan.parts.asks:
        return {}, dict.fromkeys(requests, Measured())

    def begin(names: Collection[str]) -> None:
        if ways := len(base.keys() & names):
            say(f"the base answers {_base_questions(plan)} questions, asked in {ways} ways")

    found = score_all(executor, {**base, **requests}, store, begin)
    scored, tried = ({name: found[name] for name in names} for names in (base, requests))
    # If all trials have failed, the base may tell why.
    check_some(tried or scored)
    return {**scored, "majority answer": _majority(plan)}, tried


def questions_text(plan: Plan) -> str:
    """Return the sentence that says, before a sweep starts, how much will be scored after its search."""
    if not plan.parts.asks:
        return "raw text has no answers to score: the trial with the least validation loss wins"
    test = len(plan.parts.test)
    text = f"to be scored after the search: {len(plan.parts.val) + test} examples for each trial that can win"
    if squeezed := _most_squeezed(plan):
        some = "the squeezed adapter" if squeezed == 1 else f"each of up to {squeezed} squeezed adapters"
        text += f" and {some}"
    if len(plan.points) > 1:
        text += f", {test} for each other trial"
    if asked := len(_base_requests(plan)):
        text += f", and {_base_questions(plan)} for the base in {asked} ways (evaluate.base_examples)"
    return text


def _most_squeezed(plan: Plan) -> int:
    """Return how many squeezed adapters there will be, at most: a rank that a winner is below is left out."""
    config = plan.config.squeeze
    made = min(config.winners, len(plan.points)) * len(targets(config, None))
    return made if config.cont is None else 2 * made


def _base_questions(plan: Plan) -> int:
    """Return how many examples the base answers in each way."""
    return sum(len(sample(len(part), _base_sample(plan))) for part in (plan.parts.val, plan.parts.test))


def _base_requests(plan: Plan) -> dict[str, ScoreRequest]:
    """Return the requests for the base, prompted in three ways: name → request; none for a classifier.

    The base answers a sample of a part that has more than `evaluate.base_examples`.
    """
    if plan.run.model.task != "causal_lm":
        return {}
    return {
        name: ScoreRequest(
            run=plan.run,
            parts=("val", "test"),
            style=style,  # type: ignore[arg-type]
            expected=plan.identity,
            examples=_base_sample(plan),
        )
        for name, style in STYLES.items()
    }


def _majority(plan: Plan) -> Measured:
    """Score the majority answer."""
    majority, scorer = majority_answer(plan.parts), plan.parts.scorer
    parts: tuple[Part, ...] = ("val", "test")
    return Measured(
        {part: [scorer.score(example, majority) for example in getattr(plan.parts, part)] for part in parts}
    )


def _base_sample(plan: Plan) -> int | None:
    """Return the most questions of a part that the base answers; None if it answers all."""
    most = plan.run.evaluate.base_examples
    return most if most < max(len(plan.parts.val), len(plan.parts.test)) else None


def score_trials(
    plan: Plan,
    executor: Executor,
    trials: Sequence[Trial],
    can_win: Sequence[Trial],
    store: ScoreStore | None = None,
) -> dict[str, Measured]:
    """Score what each trial saved: those that can win on val and test, the others on test alone.

    Returns:
        Name of a trial → its scores. Failed trials are missing.

    Raises:
        TrainError: if none of them can be scored.
    """
    found = score_all(executor, _trial_requests(plan, trials, can_win), store)
    check_some(found)
    return found


def _trial_requests(plan: Plan, trials: Sequence[Trial], can_win: Sequence[Trial]) -> dict[str, ScoreRequest]:
    requests, able = {}, {trial.point.name for trial in can_win}
    for trial in trials:
        if trial.result is None:
            continue
        run, adapter = outcome(trial.point.run, trial.result.folder)
        requests[trial.point.name] = ScoreRequest(
            run=run,
            parts=("val", "test") if trial.point.name in able else ("test",),
            adapter=adapter,
            expected=plan.identity if adapter else plan.identity.of_data(),
        )
    return requests


def score_squeezed(
    executor: Executor,
    items: Sequence[SqueezedAdapter],
    parts: tuple[Part, ...] = ("val", "test"),
    store: ScoreStore | None = None,
) -> dict[str, Measured]:
    """Score squeezed adapters, as loaded from their folders.

    Returns:
        Name of an adapter → its scores, or an `error`.
    """
    requests = {}
    for item in items:
        assert item.source.run is not None
        requests[item.name] = ScoreRequest(
            run=item.source.run,
            parts=parts,
            adapter=str(item.folder),
            expected=item.source.identity,
        )
    return score_all(executor, requests, store)


def marked(trials: Sequence[Trial], scores: Mapping[str, Measured]) -> list[Trial]:
    """Return the trials, with those that could not be scored marked as failed and with the reason."""
    return [
        replace(trial, error=f"can't be scored: {measured.error}; run the same command again")
        if (measured := scores.get(trial.point.name)) is not None and measured.error
        else trial
        for trial in trials
    ]


def outcome(run: RunConfig, folder: str) -> tuple[RunConfig, str | None]:
    """Return how to load the outcome of a run.

    Returns:
        The run with its base, and the adapter folder; or, for a method that saves a whole model, the run with
        that model as its base, and None.
    """
    if not method(run.method.name).saves_model:
        return run, folder
    return run.model_copy(update={"model": run.model.model_copy(update={"name": folder})}), None

"""The stages of a sweep as functions: score, choose, squeeze."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray

from rayft.artifacts import AdapterArtifact, folder_bytes
from rayft.data.source import majority_answer
from rayft.errors import TrainError
from rayft.evaluate.compare import interval
from rayft.flow.preflight import Plan
from rayft.methods import method
from rayft.report.frame import Score
from rayft.squeeze.rank import retained_energy, squeeze
from rayft.sweep.broker import Event, Job
from rayft.sweep.executor import Executor
from rayft.sweep.score import ScoreRequest, folder_files, spread
from rayft.sweep.tuner import Trial

__all__ = [
    "Measured",
    "SqueezedAdapter",
    "choose",
    "score_all",
    "score_baselines",
    "score_squeezed",
    "score_trials",
    "smallest_good",
    "squeeze_winner",
    "why_not_served",
]

STYLES = {"base": "as_is", "answer only": "answer_only", "few shot": "few_shot"}


@dataclass(frozen=True)
class Measured:
    """Scores of one adapter (or baseline): part → value of each example."""

    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)

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


@dataclass(frozen=True)
class SqueezedAdapter:
    """A lower rank of the winner, made."""

    name: str
    rank: int
    folder: Path
    parameters: int
    bytes: int
    energy: Mapping[str, float]
    seconds: float


def score_all(executor: Executor, requests: Mapping[str, ScoreRequest]) -> dict[str, Measured]:
    """Score many at once (as many as there are lanes).

    Raises:
        TrainError: if one can't be scored.
    """
    if not requests:
        return {}
    executor.submit([Job(name, "score", {"request": request}) for name, request in requests.items()])
    found = {}
    for name in requests:
        event: Event = ray.get(executor.broker.next_event.remote(name))
        if event.kind == "failed":
            raise TrainError(f"{name} can't be scored: {event.values['error']}")
        found[name] = Measured(event.values["scores"])
    return found


def score_baselines(plan: Plan, executor: Executor) -> dict[str, Measured]:
    """Score what is reached without training: the base, prompted three ways, and the majority answer."""
    majority = majority_answer(plan.parts)
    scorer = plan.parts.scorer
    guessed = {
        part: [scorer.score(example, majority) for example in getattr(plan.parts, part)]
        for part in ("val", "test")
    }
    found = {}
    if plan.run.model.task == "causal_lm":
        requests = {
            name: ScoreRequest(run=plan.run.model_dump_json(), parts=("val", "test"), style=style)  # type: ignore[arg-type]
            for name, style in STYLES.items()
        }
        found = score_all(executor, requests)
    return {**found, "majority answer": Measured(guessed)}


def score_trials(executor: Executor, trials: Sequence[Trial]) -> dict[str, Measured]:
    """Score what each trial saved: finished ones on val and test, stopped ones on test alone."""
    requests = {}
    for trial in trials:
        if trial.result is None:
            continue
        run, folder = trial.point.run, str(trial.result["folder"])
        adapter: str | None = folder
        if method(run.method.name).saves_model:
            run, adapter = (
                run.model_copy(update={"model": run.model.model_copy(update={"name": folder})}),
                None,
            )
        requests[trial.point.name] = ScoreRequest(
            run=run.model_dump_json(),
            parts=("val", "test") if trial.status == "finished" else ("test",),
            adapter=adapter,
            files=_files(adapter),
        )
    return score_all(executor, requests)


def choose(plan: Plan, trials: Sequence[Trial], scores: Mapping[str, Measured]) -> Trial | None:
    """Choose the best finished trial on the validation part; None if none has finished."""
    finished = [trial for trial in trials if trial.result is not None and trial.status == "finished"]
    if not finished:
        return None

    def loss(trial: Trial) -> float:
        assert trial.result is not None
        return float(trial.result["val_loss"])

    if plan.config.sweep.select_by == "val_loss":
        return min(finished, key=loss)
    return max(finished, key=lambda trial: (scores[trial.point.name].mean("val") or 0.0, -loss(trial)))


def why_not_served(winner: Trial, trials: Sequence[Trial]) -> str:
    """Say why a winner without factors stays where it is, and what can be served instead."""
    assert winner.result is not None
    kind = method(winner.point.run.method.name)
    what = "is a whole model" if kind.saves_model else f"is {kind.name}, whose update has no low-rank factors"
    loras = [
        trial
        for trial in trials
        if trial.result and trial.status == "finished" and method(trial.point.run.method.name).exports_lora
    ]
    best = min(loras, key=lambda trial: float((trial.result or {})["val_loss"]), default=None)
    instead = "run a sweep with lora beside it for one that can"
    if best is not None and best.result is not None:
        instead = f"the best one that can is {best.point.name} in {best.result['folder']}"
    return (
        f"{winner.point.name} {what}: it is saved in {winner.result['folder']}, and can't be squeezed, "
        f"registered, promoted or served here; {instead}"
    )


def squeeze_winner(plan: Plan, winner: Trial) -> tuple[AdapterArtifact, list[SqueezedAdapter]]:
    """Sort the winner's columns by singular value (`winner/`) and make its lower ranks (`squeezed/`)."""
    assert winner.result is not None
    source = AdapterArtifact.load(winner.result["folder"])
    full = squeeze(source)
    full.save(plan.output / "winner")
    made = [
        _save(plan, f"{winner.point.name}@r{rank}", full, rank=rank)
        for rank in plan.config.squeeze.ranks
        if rank < source.rank
    ]
    if plan.config.squeeze.energy is not None:
        energy = plan.config.squeeze.energy
        made.append(_save(plan, f"{winner.point.name}@e{energy:g}", full, energy=energy))
    return full, made


def score_squeezed(plan: Plan, executor: Executor, made: Sequence[SqueezedAdapter]) -> dict[str, Measured]:
    """Score the squeezed adapters as they lie on disk."""
    requests = {
        item.name: ScoreRequest(
            run=plan.run.model_dump_json(),
            parts=("val", "test"),
            adapter=str(item.folder),
            files=_files(str(item.folder)),
        )
        for item in made
    }
    return score_all(executor, requests)


def _files(adapter: str | None) -> dict[str, bytes]:
    """Send an adapter along where lanes may be on other machines."""
    return folder_files(Path(adapter)) if adapter and spread() else {}


def _save(
    plan: Plan, name: str, full: AdapterArtifact, *, rank: int | None = None, energy: float | None = None
) -> SqueezedAdapter:
    started = time.perf_counter()
    small = squeeze(full, rank=rank, energy=energy)
    folder = small.save(plan.output / "squeezed" / name.rpartition("@")[2])
    return SqueezedAdapter(
        name=name,
        rank=small.rank,
        folder=folder,
        parameters=small.parameters,
        bytes=folder_bytes(folder),
        energy=retained_energy(small),
        seconds=time.perf_counter() - started,
    )


def smallest_good(
    made: Sequence[SqueezedAdapter], scores: Mapping[str, Measured], winner_score: float, keep: float
) -> SqueezedAdapter | None:
    """Find the smallest squeezed adapter that keeps a share of the winner's validation score."""
    good = [item for item in made if (scores[item.name].mean("val") or 0.0) >= keep * winner_score]
    return min(good, key=lambda item: item.parameters, default=None)

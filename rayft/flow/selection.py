"""Decide which trial wins a sweep, which adapter ships, and which are served. Nothing else decides this.

Everything is chosen on the validation part, by the sweep's rule (`sweep.select_by`): the least loss, or the
best score and then the least loss. The test part is only reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rayft.flow.scoring import Measured
from rayft.flow.squeeze.make import SqueezedAdapter
from rayft.models.methods import method
from rayft.report.record import SweepRecord, TrialRecord, Winner
from rayft.sweep.search import Trial

__all__ = [
    "ServedAdapter",
    "best_first",
    "candidates",
    "choose",
    "chosen_settings",
    "keeps",
    "served_adapters",
    "smallest_good",
    "why_not_served",
]

Rule = Literal["val_loss", "val_score"]


def _order(losses: Sequence[float], scores: Sequence[float | None], rule: Rule) -> tuple[float, float]:
    """Return a sort key that is smallest for the best, from the means over some trials.

    Args:
        losses: validation loss of each trial. A loss that is not a number counts as the worst.
        scores: validation score of each trial; one that was not scored counts as 0.
        rule: the sweep's rule.
    """
    loss = float(np.mean(losses))
    loss = math.inf if math.isnan(loss) else loss
    return (loss, 0.0) if rule == "val_loss" else (-float(np.mean([score or 0.0 for score in scores])), loss)


def _order_of(trials: Sequence[Trial], scores: Mapping[str, Measured], rule: Rule) -> tuple[float, float]:
    """Return the sort key of some trials together."""
    found = [scores.get(trial.point.name, Measured()).mean("val") for trial in trials]
    return _order([_loss(trial) for trial in trials], found, rule)


def _loss(trial: Trial) -> float:
    assert trial.result is not None
    return trial.result.val_loss


def best_first(trials: Sequence[Trial], scores: Mapping[str, Measured], rule: Rule) -> list[Trial]:
    """Sort the trials that can win; the first is the winner.

    Args:
        trials: of the sweep.
        scores: name of a trial → its scores.
        rule: the sweep's rule.
    """
    return sorted(candidates(trials), key=lambda trial: _order_of([trial], scores, rule))


def candidates(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that can win: the finished ones, and stopped ones with a loss below all of theirs."""
    finished = [trial for trial in trials if trial.status == "finished"]
    least = min((loss for trial in finished if not math.isnan(loss := _loss(trial))), default=math.inf)
    stopped = [trial for trial in trials if trial.status == "stopped" and _loss(trial) < least]
    return finished + stopped


@dataclass(frozen=True)
class ChosenSettings:
    """The settings at which a method is compared with others."""

    method: str
    trials: Sequence[Trial]
    """Its trials at these settings, which differ in their seed alone."""
    tried: int
    """Number of settings that were tried."""


def chosen_settings(
    trials: Sequence[Trial], scores: Mapping[str, Measured], rule: Rule
) -> list[ChosenSettings]:
    """Choose each method's settings: those whose finished seeds have the best mean on the validation part.

    Settings of which fewer seeds have finished than of others of the same method are not chosen.

    Args:
        trials: of the sweep; those that are not finished, or not scored on the test part, don't count.
        scores: name of a trial → its scores.
        rule: the sweep's rule.

    Returns:
        One for each method, the best first.
    """
    grouped: dict[str, dict[str, list[Trial]]] = {}
    for trial in trials:
        if trial.status == "finished" and "test" in scores.get(trial.point.name, Measured()).parts:
            run = trial.point.run
            grouped.setdefault(run.method.name, {}).setdefault(run.setting, []).append(trial)
    found = []
    for name, groups in grouped.items():
        most = max(map(len, groups.values()))
        whole = (group for group in groups.values() if len(group) == most)
        best = min(whole, key=lambda group: _order_of(group, scores, rule))
        found.append(ChosenSettings(name, best, len(groups)))
    return sorted(found, key=lambda one: _order_of(one.trials, scores, rule))


def keeps(score: float, best: float, share: float) -> bool:
    """Return whether a score is at least a share of another, up to rounding: 18/25 is 90 % of 20/25."""
    return score >= share * best or math.isclose(score, share * best, rel_tol=1e-9)


def smallest_good(
    made: Sequence[SqueezedAdapter], scores: Mapping[str, Measured], winner_score: float, keep: float
) -> SqueezedAdapter | None:
    """Find the smallest squeezed adapter that keeps a share of the winner's validation score.

    Of several that are as small, this is the one with the best validation score.

    Args:
        made: the squeezed adapters.
        scores: name of a squeezed adapter → its scores.
        winner_score: the winner's score on the validation part.
        keep: the share of it that must be kept.

    Returns:
        None if no adapter keeps it.
    """
    reached = {
        item.name: scores[item.name].mean("val") or 0.0 for item in made if not scores[item.name].error
    }
    good = [item for item in made if item.name in reached and keeps(reached[item.name], winner_score, keep)]
    return min(good, key=lambda item: (item.parameters, -reached[item.name]), default=None)


def choose(
    winner: Trial | None,
    squeezed: Sequence[SqueezedAdapter],
    scores: Mapping[str, Measured],
    rule: Rule,
    keep: float,
) -> Winner | None:
    """Choose what a sweep ships, the winner or a squeezed version of it, and give the reason in words.

    Args:
        winner: the best trial; None if all have failed.
        squeezed: all squeezed adapters of the sweep.
        scores: name of a trial or squeezed adapter → its scores.
        rule: the sweep's rule.
        keep: share of the winner's validation score that a squeezed version must keep.
    """
    if winner is None:
        return None
    name, best = winner.point.name, f"best {rule.replace('_', ' ')} of all trials"
    reached = scores[name].mean("val")
    mine = [item for item in squeezed if item.source.name == name]
    small = smallest_good(mine, scores, reached, keep) if reached else None
    if small is not None:
        why = f"the smallest version of {name} that keeps {100 * keep:g} % of its validation score"
        return Winner(trial=name, ship=small.name, why=f"{why}; {name} has the {best}")
    if method(winner.point.run.method.name).exports_lora:
        return Winner(trial=name, ship=name, why=best)
    if mine:
        without = (
            f"and no LoRA that was extracted from it is known to keep {100 * keep:g} % of its validation "
            "score: nothing was registered"
        )
    else:
        without = "so it was neither squeezed nor registered and can't be served"
    return Winner(trial=name, ship=name, why=f"{best}; it has no low-rank factors, {without}")


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter of a sweep that is served."""

    name: str
    """Served name."""
    folder: Path
    trial: str
    """Id of the trial that it comes from."""
    registered: str
    """Registered model of which it becomes a version."""
    scored: str
    """Name under which it was scored: that of its trial or of a squeezed adapter."""
    shipped: bool = False
    """Whether it is the adapter that ships, which is registered under the sweep's own name."""


def served_adapters(output: Path, record: SweepRecord) -> list[ServedAdapter]:
    """Return the adapters to serve, the winner first.

    The list has the winner, its squeezed version if that ships and was trained further, and the best trial of
    each other method. The winner's squeezed ranks are views of it and need no entry. If the winner has no
    low-rank factors, the LoRA that was extracted from it takes its place, provided that it ships.

    Args:
        output: the sweep's folder.
        record: what the sweep found.

    Returns:
        Nothing if the winner has no factors and nothing was extracted from it.
    """
    if record.winner is None:
        return []
    winner = next(trial for trial in record.trials if trial.id == record.winner.trial)
    ship = next((item for item in record.squeezed if item.name == record.winner.ship), None)
    viewed = method(winner.method).exports_lora
    main = output / "winner" if viewed else Path(ship.folder) if ship else None
    if main is None or not main.is_dir():
        return []
    found: list[ServedAdapter] = []
    if viewed and ship is not None and ship.how == "cont":
        # An adapter that was trained further is not a view of the winner, so both are served. The one that
        # ships is the sweep's registered model.
        own = _served_name(record.name, winner.method)
        found.append(ServedAdapter(record.name, main, winner.id, own, winner.id))
        name = f"{record.name}-{ship.name.rpartition('@')[2].replace('+', '-cont')}"
        found.append(ServedAdapter(name, Path(ship.folder), winner.id, record.name, ship.name, shipped=True))
    else:
        scored = winner.id if viewed or ship is None else ship.name
        found.append(ServedAdapter(record.name, main, winner.id, record.name, scored, shipped=True))
    for best in _best_of_others(record, winner):
        name = _served_name(record.name, best.method)
        found.append(ServedAdapter(name, Path(best.folder), best.id, name, best.id))
    return found


def _served_name(sweep: str, method_name: str) -> str:
    # The name of a served or registered model must not have a colon, as `peft:LoRA` has.
    return f"{sweep}-{method_name.replace(':', '-')}"


def _best_of_others(record: SweepRecord, winner: TrialRecord) -> list[TrialRecord]:
    """Return the best finished trial of each other method that exports LoRA, sorted by method."""
    best: dict[str, TrialRecord] = {}

    def order(trial: TrialRecord) -> tuple[float, float]:
        loss = trial.kept_val_loss
        return _order([math.inf if loss is None else loss], [trial.val_score], record.select_by)

    for trial in sorted(record.trials, key=order):
        if trial.status == "finished" and trial.method != winner.method and method(trial.method).exports_lora:
            best.setdefault(trial.method, trial)
    return [best[name] for name in sorted(best)]


def why_not_served(winner: Trial, trials: Sequence[Trial], *, extracted: bool) -> str:
    """Return why a winner without low-rank factors is not served, and what can be instead.

    Args:
        winner: the best trial.
        trials: of the sweep.
        extracted: whether LoRAs were extracted from it, none of which keeps its score.
    """
    assert winner.result is not None
    kind = method(winner.point.run.method.name)
    what = "is a whole model" if kind.saves_model else f"is {kind.name}, whose update has no low-rank factors"
    loras = [
        trial
        for trial in trials
        if trial.result and trial.status == "finished" and method(trial.point.run.method.name).exports_lora
    ]
    best = min(loras, key=_loss, default=None)
    instead = "run a sweep with lora beside it for one that can"
    if best is not None and best.result is not None:
        instead = f"the best one that can is {best.point.name} in {best.result.folder}"
    if extracted:
        cant = (
            "no LoRA that was extracted from it is known to keep its score, so nothing is registered, "
            "promoted or served"
        )
    else:
        cant = "it can't be squeezed, registered, promoted or served here"
    return f"{winner.point.name} {what}: it is saved in {winner.result.folder}; {cant}; {instead}"

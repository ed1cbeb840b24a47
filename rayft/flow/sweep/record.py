"""Build the record of a sweep, from which the report is made, out of the findings of its stages."""

from __future__ import annotations

import datetime as dt
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayft.artifacts import AdapterArtifact
from rayft.config import leaves
from rayft.evaluate.compare import over_seeds, paired
from rayft.flow.scoring import Measured
from rayft.flow.selection import ChosenSettings, ServedAdapter, choose, chosen_settings, served_adapters
from rayft.flow.squeeze.make import SqueezedAdapter
from rayft.flow.sweep.preflight import Plan
from rayft.models.methods import method as find_method
from rayft.report.record import (
    Baseline,
    Command,
    Comparison,
    MethodScore,
    Score,
    Squeezed,
    SweepRecord,
    TrialRecord,
)
from rayft.report.text import score_text
from rayft.sweep.score import sample
from rayft.sweep.search import Trial
from rayft.tracking.base import PENDING, TrackerSpec, redacted
from rayft.tracking.mlflow import resolve_runs
from rayft.tracking.provenance import provenance
from rayft.tracking.view import place

__all__ = ["Findings", "build_record", "described", "with_run_ids"]

REFERENCE = "lora"
"""Method that the others are compared with, if it is among them."""
UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` listens."""


@dataclass
class Findings:
    """What the stages of a sweep have found so far."""

    baselines: dict[str, Measured] = field(default_factory=dict)
    """Name of a baseline → its scores."""
    trials: list[Trial] = field(default_factory=list)
    scores: dict[str, Measured] = field(default_factory=dict)
    """Name of a trial or squeezed adapter → its scores."""
    winner: Trial | None = None
    full: AdapterArtifact | None = None
    """The winner with its columns sorted by singular value, if it has low-rank factors."""
    squeezed: list[SqueezedAdapter] = field(default_factory=list)
    spent: Mapping[str, float] = field(default_factory=dict)
    """What lanes spent time on → seconds."""


def build_record(
    plan: Plan, found: Findings, timings: Mapping[str, float], run_id: str = PENDING
) -> SweepRecord:
    """Return the record of a sweep.

    Args:
        plan: the sweep's.
        found: the findings of its stages.
        timings: stage → seconds.
        run_id: tracked run of the sweep.
    """
    config, origin, rule = plan.config, provenance(), plan.config.sweep.select_by
    versions = {
        name.removeprefix("version."): value for name, value in origin.items() if name.startswith("version.")
    }
    dirty = "-dirty" if origin.get("git.dirty") == "true" else ""
    winner = choose(found.winner, found.squeezed, found.scores, rule, config.squeeze.keep_score)
    record = SweepRecord(
        name=config.name,
        question=config.question
        or f"Which adapter of {config.model.name} is best at {plan.identity.data_name}?",
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        model=config.model.name,
        task=f"{plan.identity.data_name} ({config.data.source})",
        metric=_metric(plan),
        select_by=rule,
        data_digest=plan.parts.digest,
        data_sizes={part: len(getattr(plan.parts, part)) for part in ("train", "val", "test")},
        data_dropped=tuple(item.text for item in plan.parts.dropped),
        seed=config.seed,
        device=f"{origin['device']}, {plan.run.scale.dtype}",
        versions={"python": origin["python"], **versions},
        git_commit=origin["git.commit"] + dirty if "git.commit" in origin else "",
        baselines=tuple(
            _baseline(name, measured) for name, measured in found.baselines.items() if not measured.error
        ),
        trials=tuple(_trial(trial, found.scores.get(trial.point.name, Measured())) for trial in found.trials),
        winner=winner,
        no_winner="" if winner else "every trial failed; their reasons are below",
        squeezed=tuple(_squeezed(item, found.scores) for item in found.squeezed),
        comparisons=_comparisons(found),
        methods=_compare_methods(chosen_settings(found.trials, found.scores, rule), found.scores),
        singular_values=found.full.meta.singular_values if found.full else {},
        timings=dict(timings),
        spent=dict(found.spent),
    )
    served = config.model.task == "causal_lm" and bool(served_adapters(plan.output, record))
    return record.model_copy(update={"commands": _commands(plan, run_id, served=served)})


def described(item: ServedAdapter, record: SweepRecord) -> str:
    """Return what a registered adapter is, in words: what it was trained on, how, and how well it answers."""
    trial = next(trial for trial in record.trials if trial.id == item.trial)
    squeezed = next((one for one in record.squeezed if one.name == item.scored), None)
    test = squeezed.test if squeezed else trial.test
    score = f" It scores {score_text(test)} ({record.metric}, {test.n} test questions)." if test else ""
    rank = squeezed.rank if squeezed else trial.rank
    return (
        f"{trial.method} adapter of rank {rank} for {record.model}, trained on {record.task} in the sweep "
        f"{record.name} (trial {trial.id}{', squeezed' if squeezed else ''}).{score}"
    )


def with_run_ids(record: SweepRecord, tracker: TrackerSpec) -> SweepRecord:
    """Return a record with the ids that MLflow has by now for runs that started while it did not answer."""
    ids = resolve_runs(tracker, [trial.run_id for trial in record.trials])
    trials = tuple(trial.model_copy(update={"run_id": ids[trial.run_id]}) for trial in record.trials)
    return record.model_copy(update={"trials": trials})


def _metric(plan: Plan) -> str:
    """Return what a score is the mean of, in words."""
    if plan.parts.labels:
        return "accuracy"
    if plan.parts.scorer.config.kind != "exact":
        return f"{plan.parts.scorer.config.kind} score"
    return "exact match" if plan.config.data.score == "strict" else "native score"


def _baseline(name: str, measured: Measured) -> Baseline:
    test = measured.score("test")
    assert test is not None
    return Baseline(name=name, test=test, val_score=measured.mean("val"))


def _trial(trial: Trial, measured: Measured) -> TrialRecord:
    config, result = trial.point.run.method, trial.result
    kind = find_method(config.name)
    ranked = kind.rank(config) is not None
    common = {
        "id": trial.point.name,
        "method": config.name,
        "rank": trial.point.run.final_rank if ranked else None,
        "alpha": kind.alpha(config),
        "lr": trial.point.run.optim.lr,
        "seed": trial.point.run.seed,
        "settings": leaves(trial.point.run),
        "status": trial.status,
        "run_id": trial.run_id,
    }
    if result is None:
        return TrialRecord(**common, reason=trial.error)  # type: ignore[arg-type]
    behind = "" if result.finished else f"behind others at step {result.steps}"
    varies = config.chain is not None or trial.point.run.anneal is not None
    early = not result.finished or result.kept_step is not None
    if ranked and varies and early and result.rank:
        # It has kept what it had before its last link, or before its rank had fallen all the way.
        common["rank"] = result.rank
    seconds = result.seconds
    return TrialRecord(
        **common,  # type: ignore[arg-type]
        reason=trial.error or behind,
        steps=result.steps,
        val_loss=tuple(result.val_curve),
        kept_step=result.kept_step,
        train_loss=tuple(result.train_curve),
        val_score=measured.mean("val"),
        test=measured.score("test"),
        trainable=result.trainable,
        bytes=result.bytes,
        seconds=seconds["train"] + seconds["evaluate"],
        overhead_seconds=seconds["overhead"],
        peak_memory_bytes=result.peak_memory or None,
        folder=result.folder,
    )


def _squeezed(item: SqueezedAdapter, scores: Mapping[str, Measured]) -> Squeezed:
    return Squeezed(
        name=item.name,
        trial=item.source.name,
        how=item.how,
        rank=item.rank,
        energy_mean=item.energy_mean,
        energy_min=item.energy_min,
        val_score=scores[item.name].mean("val"),
        test=scores[item.name].score("test"),
        val_loss=item.val_loss,
        parameters=item.parameters,
        bytes=item.bytes,
        seconds=item.seconds,
        folder=str(item.folder),
    )


def _comparisons(found: Findings) -> tuple[Comparison, ...]:
    """Compare the winner with the best baseline and with each trial, and squeezed versions with both.

    Without baselines nothing has been scored, and nothing can be compared.
    """
    known = [key for key, measured in found.baselines.items() if not measured.error]
    if found.winner is None or not known:
        return ()
    name, scores, baselines = found.winner.point.name, found.scores, found.baselines
    best = max(known, key=lambda key: baselines[key].mean("val") or 0.0)
    pairs = [(name, scores[name], best, baselines[best])]
    versions = {item.name for item in found.squeezed}
    others = [other for other in scores if other != name and other not in versions]
    pairs += [(name, scores[name], other, scores[other]) for other in others if "test" in scores[other].parts]
    for item in found.squeezed:
        source = item.source.name
        pairs.append((item.name, scores[item.name], source, scores[source]))
        pairs.append((item.name, scores[item.name], best, baselines[best]))
    return tuple(_compare(*pair) for pair in pairs)


def _compare(name: str, one: Measured, against: str, other: Measured) -> Comparison:
    ones, others = one.parts["test"], other.parts["test"]
    n = min(len(ones), len(others))
    # The base may have answered a sample of the questions.
    ones, others = ([values[index] for index in sample(len(values), n)] for values in (ones, others))
    found = paired(ones, others)
    difference = Score(value=found.difference, low=found.ci_low, high=found.ci_high, n=n)
    return Comparison(name=name, against=against, difference=difference)


def _compare_methods(
    chosen: Sequence[ChosenSettings], scores: Mapping[str, Measured]
) -> tuple[MethodScore, ...]:
    """Compare methods at their chosen settings; empty where fewer than two have finished.

    Test scores and differences are means over seeds and questions with an interval for another draw of both
    (`rayft.evaluate.compare.over_seeds`).
    """
    if len(chosen) < 2:
        return ()
    tests = {one.method: _test_matrix(one.trials, scores) for one in chosen}
    reference = REFERENCE if REFERENCE in tests else chosen[0].method
    return tuple(
        MethodScore(
            method=one.method,
            settings=re.sub(rf"-s{one.trials[0].point.run.seed}$", "", one.trials[0].point.name),
            tried=one.tried,
            trials=tuple(trial.point.name for trial in one.trials),
            val_loss=float(np.mean([trial.result.val_loss for trial in one.trials if trial.result])),
            test=_over_seeds(tests[one.method]),
            against=None if one.method == reference else reference,
            difference=None if one.method == reference else _over_seeds(tests[one.method], tests[reference]),
        )
        for one in chosen
    )


def _test_matrix(trials: Sequence[Trial], scores: Mapping[str, Measured]) -> NDArray[np.float64]:
    """Return the test scores of some trials (trials × questions)."""
    return np.array([scores[trial.point.name].parts["test"] for trial in trials], np.float64)


def _over_seeds(one: NDArray[np.float64], other: NDArray[np.float64] | None = None) -> Score:
    found = over_seeds([one], None if other is None else [other])
    return Score(value=found.value, low=found.ci_low, high=found.ci_high, n=one.shape[1])


def _commands(plan: Plan, run_id: str, *, served: bool) -> tuple[Command, ...]:
    output = shlex.quote(_short(plan.output))
    shown = "" if run_id.startswith(PENDING) else f"/{place(plan.tracker.experiment_id, run_id)}"
    commands = {
        "Run the sweep again": f"rayft sweep {output}/config.yaml",
        **_compare_commands(plan.tracker.uri, shown),
        "Serve the result": f"rayft serve {output}/serve.yaml" if served else "",
        "Make this report again": f"rayft report {output}",
    }
    return tuple(Command(what=what, command=command) for what, command in commands.items() if command)


def _compare_commands(uri: str, shown: str) -> dict[str, str]:
    """Return what shows the runs in MLflow's UI, without any password: what it does → the command.

    A database needs a server to be started for it; a tracking server has its own page.

    Args:
        uri: of the tracking server or database.
        shown: what to show, to be put behind the address of a server; empty for the UI's first page.
    """
    if uri.startswith("databricks"):
        return {}
    if uri.startswith("http"):
        page = shlex.quote(redacted(uri).rstrip("/") + shown)
        return {"Compare the runs": f"python -m webbrowser {page}"}
    short = redacted(uri).replace(f"{Path.cwd()}/", "") if uri.startswith("sqlite") else redacted(uri)
    start = {"Compare the runs": f"mlflow ui --backend-store-uri {shlex.quote(short)}"}
    return start | ({"  and open": UI + shown} if shown else {})


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

"""From what the stages found to the record that is reported."""

from __future__ import annotations

import datetime as dt
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rayft.artifacts import AdapterArtifact
from rayft.config import leaves
from rayft.evaluate.compare import paired
from rayft.flow.method_scores import method_scores
from rayft.flow.scoring import Measured
from rayft.flow.squeeze.make import SqueezedAdapter, smallest_good
from rayft.flow.sweep.preflight import Plan
from rayft.methods import method as find_method
from rayft.report.record import (
    Baseline,
    Command,
    Comparison,
    Score,
    Squeezed,
    SweepRecord,
    Trial,
    Winner,
)
from rayft.sweep.tuner import Trial as EndedTrial
from rayft.tracking.base import TrackerSpec, redacted
from rayft.tracking.mlflow import resolve_runs
from rayft.tracking.provenance import provenance

__all__ = ["build_record", "with_run_ids"]


def build_record(
    plan: Plan,
    baselines: Mapping[str, Measured],
    trials: Sequence[EndedTrial],
    scores: Mapping[str, Measured],
    winner: EndedTrial | None,
    full: AdapterArtifact | None,
    squeezed: Sequence[SqueezedAdapter],
    timings: Mapping[str, float],
) -> SweepRecord:
    """Put a sweep's findings together."""
    config, origin = plan.config, provenance()
    versions = {
        name.removeprefix("version."): value for name, value in origin.items() if name.startswith("version.")
    }
    dirty = "-dirty" if origin.get("git.dirty") == "true" else ""
    ship = _ship(plan, winner, squeezed, scores)
    return SweepRecord(
        name=config.name,
        question=config.question or f"Which adapter of {config.model.name} is best at {config.data.name}?",
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        model=config.model.name,
        task=f"{config.data.name} ({config.data.source})",
        metric=_metric(plan),
        data_digest=plan.parts.digest,
        data_sizes={part: len(getattr(plan.parts, part)) for part in ("train", "val", "test")},
        data_dropped=tuple(item.text for item in plan.parts.dropped),
        seed=config.seed,
        device=f"{origin['device']}, {plan.run.scale.dtype}",
        versions={"python": origin["python"], **versions},
        git_commit=origin["git.commit"] + dirty if "git.commit" in origin else "",
        baselines=tuple(
            _baseline(name, measured) for name, measured in baselines.items() if not measured.error
        ),
        trials=tuple(_trial(trial, scores.get(trial.point.name, Measured())) for trial in trials),
        winner=ship,
        no_winner="" if ship else "no trial finished; look at why in the table",
        squeezed=tuple(_squeezed(item, scores) for item in squeezed),
        comparisons=_comparisons(winner, baselines, scores, squeezed),
        methods=method_scores(plan, trials, scores),
        singular_values=full.meta.singular_values if full else {},
        timings=dict(timings),
        commands=_commands(plan, servable=_servable(plan, full, ship)),
    )


def with_run_ids(record: SweepRecord, tracker: TrackerSpec) -> SweepRecord:
    """Return a record with the ids that runs which were begun while MLflow was away have by now."""
    ids = resolve_runs(tracker, [trial.run_id for trial in record.trials])
    trials = tuple(trial.model_copy(update={"run_id": ids[trial.run_id]}) for trial in record.trials)
    return record.model_copy(update={"trials": trials})


def _servable(plan: Plan, full: AdapterArtifact | None, ship: Winner | None) -> bool:
    """Tell whether the winner, or what was made of it, generates text as an adapter."""
    adapter = full is not None or (ship is not None and ship.ship != ship.trial)
    return adapter and plan.config.model.task == "causal_lm"


def _metric(plan: Plan) -> str:
    """Say what a score is."""
    if plan.parts.labels:
        return "accuracy"
    return "exact match" if plan.config.data.score == "strict" else "native score"


def _ship(
    plan: Plan,
    winner: EndedTrial | None,
    squeezed: Sequence[SqueezedAdapter],
    scores: Mapping[str, Measured],
) -> Winner | None:
    if winner is None:
        return None
    name, rule = winner.point.name, plan.config.sweep.select_by.replace("_", " ")
    reached, keep = scores[name].mean("val"), plan.config.squeeze.keep_score
    mine = [item for item in squeezed if item.source.name == name]
    small = smallest_good(mine, scores, reached, keep) if reached else None
    if small is None:
        why = f"best {rule} among the trials that finished"
        if not find_method(winner.point.run.method.name).exports_lora:
            why += "; it has no low-rank factors, " + _without_factors(mine, keep)
        return Winner(trial=name, ship=name, why=why)
    why = (
        f"the smallest version of {name} that keeps {100 * keep:g} % of its validation score; {name} has the "
        f"best {rule} among the trials that finished"
    )
    return Winner(trial=name, ship=small.name, why=why)


def _without_factors(extracted: Sequence[SqueezedAdapter], keep: float) -> str:
    """Say what becomes of a winner that is no adapter, and is shipped as no other."""
    if not extracted:
        return "so it was neither squeezed nor registered and can't be served"
    return (
        f"and no LoRA that was extracted from it keeps {100 * keep:g} % of its validation score: nothing was "
        "registered"
    )


def _baseline(name: str, measured: Measured) -> Baseline:
    test = measured.score("test")
    assert test is not None
    return Baseline(name=name, test=test, val_score=measured.mean("val"))


def _trial(trial: EndedTrial, measured: Measured) -> Trial:
    config, result = trial.point.run.method, trial.result
    ranked = find_method(config.name).ranked
    common = {
        "id": trial.point.name,
        "method": config.name,
        "rank": trial.point.run.final_rank if ranked else None,
        "alpha": config.alpha or 2.0 * config.rank if ranked else None,
        "lr": trial.point.run.optim.lr,
        "seed": trial.point.run.seed,
        "settings": leaves(trial.point.run),
        "status": trial.status,
        "run_id": trial.run_id,
    }
    if result is None:
        return Trial(**common, reason=trial.error)  # type: ignore[arg-type]
    behind = "" if result["finished"] else f"behind others at step {result['steps']}"
    if ranked and not result["finished"] and result.get("rank"):
        # Stopped before its last link, or before its rank had fallen all the way.
        common["rank"] = result["rank"]
    seconds = result["seconds"]
    return Trial(
        **common,  # type: ignore[arg-type]
        reason=trial.error or behind,
        steps=result["steps"],
        val_loss=tuple((int(s), float(v)) for s, v in result["val_curve"]),
        train_loss=tuple((int(s), float(v)) for s, v in result["train_curve"]),
        val_score=measured.mean("val"),
        test=measured.score("test"),
        trainable=result["trainable"],
        bytes=result["bytes"],
        seconds=seconds["train"] + seconds["evaluate"],
        overhead_seconds=seconds["overhead"],
        peak_memory_bytes=result["peak_memory"],
        folder=result["folder"],
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


def _comparisons(
    winner: EndedTrial | None,
    baselines: Mapping[str, Measured],
    scores: Mapping[str, Measured],
    squeezed: Sequence[SqueezedAdapter],
) -> tuple[Comparison, ...]:
    """Compare the winner with the best baseline and with each trial, and squeezed versions with both."""
    if winner is None:
        return ()
    name = winner.point.name
    known = [key for key, measured in baselines.items() if not measured.error]
    best = max(known, key=lambda key: baselines[key].mean("val") or 0.0)
    pairs = [(name, scores[name], best, baselines[best])]
    versions = {item.name for item in squeezed}
    rivals = [other for other in scores if other != name and other not in versions]
    pairs += [(name, scores[name], other, scores[other]) for other in rivals if "test" in scores[other].parts]
    for item in squeezed:
        source = item.source.name
        pairs.append((item.name, scores[item.name], source, scores[source]))
        pairs.append((item.name, scores[item.name], best, baselines[best]))
    return tuple(_compare(*pair) for pair in pairs)


def _compare(name: str, one: Measured, against: str, other: Measured) -> Comparison:
    found = paired(one.parts["test"], other.parts["test"])
    n = len(one.parts["test"])
    difference = Score(value=found.difference, low=found.ci_low, high=found.ci_high, n=n)
    return Comparison(name=name, against=against, difference=difference)


def _commands(plan: Plan, *, servable: bool) -> tuple[Command, ...]:
    output = shlex.quote(_short(plan.output))
    commands = {
        "Run the sweep again": f"rayft sweep {output}/config.yaml",
        "Compare the runs": _compare_command(plan.tracker.uri),
        "Serve the result": f"rayft serve {output}/serve.yaml" if servable else "",
        "Make this report again": f"rayft report {output}",
    }
    return tuple(Command(what=what, command=command) for what, command in commands.items() if command)


def _compare_command(uri: str) -> str:
    """Say how to look at the runs: a database needs a server, a server has its page; no password is shown."""
    if uri.startswith("databricks"):
        return ""
    if uri.startswith("http"):
        return f"python -m webbrowser {shlex.quote(redacted(uri))}"
    short = redacted(uri).replace(f"{Path.cwd()}/", "") if uri.startswith("sqlite") else redacted(uri)
    return f"mlflow ui --backend-store-uri {shlex.quote(short)}"


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

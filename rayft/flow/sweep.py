"""From a configuration to a squeezed, scored, registered and reported winner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rayft.artifacts import AdapterArtifact
from rayft.config import leaves
from rayft.errors import PromotionRefusedError, TrackingError
from rayft.flow import stages
from rayft.flow.cluster import check_tracking, cluster, join
from rayft.flow.config import PipelineConfig
from rayft.flow.display import Display
from rayft.flow.preflight import Plan, preflight, sweep_hash
from rayft.flow.record import build_record
from rayft.flow.stages import Measured, SqueezedAdapter
from rayft.methods import method
from rayft.registry.promote import promote
from rayft.registry.ref import BASE_SCORE_TAG, SCORE_TAG
from rayft.registry.store import MlflowRegistry
from rayft.report.frame import Score, SweepRecord
from rayft.report.render import render
from rayft.sweep.executor import EXECUTORS, Executor
from rayft.sweep.tuner import Trial, search
from rayft.tracking.mlflow import MlflowTracker, flush_spool
from rayft.tracking.provenance import provenance

__all__ = ["run_sweep", "served_adapters"]


@dataclass
class _Findings:
    """What the stages have found so far."""

    baselines: dict[str, Measured] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    scores: dict[str, Measured] = field(default_factory=dict)
    winner: Trial | None = None
    full: AdapterArtifact | None = None
    squeezed: list[SqueezedAdapter] = field(default_factory=list)


def run_sweep(config: PipelineConfig, display: Display) -> SweepRecord:
    """Run all stages up to the report; lanes are down and memory is free when it returns.

    A sweep that was interrupted goes on: finished trials are not trained again.

    Raises:
        RayftError: if a check fails (before anything is started) or a stage can't be done.
    """
    with display.stage("checks"):
        # A cluster that is there already costs nothing to join, and tells which devices there are.
        join()
        plan = preflight(config)
    lanes, scale = config.sweep.lanes, plan.run.scale
    tracker = MlflowTracker(plan.tracker)
    parent = _start_tracking(plan, tracker)
    try:
        with cluster(lanes * scale.workers, device=scale.device, gpu_share=scale.gpu_share):
            check_tracking(plan.tracker)
            executor = EXECUTORS[plan.executor](
                scale, str(plan.output / "ray"), lanes, config.sweep.restarts, config.name
            )
            try:
                found = _measure(plan, executor, display, parent)
            finally:
                executor.close()
        record = _report(plan, found, display, tracker, parent)
    except BaseException:
        tracker.finish(parent, "failed")
        raise
    finally:
        tracker.close()
    left = flush_spool(plan.tracker).pending
    if left:
        display.say(
            f"the tracking server is away: {left} records wait in {plan.tracker.spool} and are sent by the "
            f"next `rayft report {plan.output}`"
        )
    return record


def _measure(plan: Plan, executor: Executor, display: Display, parent: str) -> _Findings:
    """Run the stages that need workers."""
    found = _Findings()
    names = {point.key: point.name for point in plan.points}
    with display.stage("start workers, score the base"):
        executor.start()
        with display.watch(executor.broker, lambda key: names.get(key, key)):
            found.baselines = stages.score_baselines(plan, executor)
    with (
        display.stage(f"search ({len(plan.points)} trials)"),
        display.watch(executor.broker, lambda key: names.get(key, key)),
    ):
        found.trials = search(
            plan.config.sweep, plan.points, executor, plan.output, tracker=plan.tracker, parent=parent
        )
    for trial in found.trials:
        display.say(_line(trial))
    with display.stage("score the trials"), display.watch(executor.broker):
        found.scores = stages.score_trials(executor, found.trials)
        found.winner = stages.choose(plan, found.trials, found.scores)
    if found.winner and method(found.winner.point.run.method.name).exports_lora:
        with display.stage("squeeze the winner"), display.watch(executor.broker):
            found.full, found.squeezed = stages.squeeze_winner(plan, found.winner)
            found.scores |= stages.score_squeezed(plan, executor, found.squeezed)
    return found


def _report(
    plan: Plan, found: _Findings, display: Display, tracker: MlflowTracker, parent: str
) -> SweepRecord:
    """Track, register, promote and report what was found."""
    with display.stage("register and report"):
        record = build_record(
            plan, found.baselines, found.trials, found.scores, found.winner, found.full, found.squeezed,
            display.timings,
        )  # fmt: skip
        record.save(plan.output / "sweep.json")
        _track(plan, record, tracker, parent)
        if found.winner and found.full:
            _register(plan, record, found.winner, display)
        elif found.winner and found.winner.result:
            display.say(stages.why_not_served(found.winner, found.trials))
        _write_serve_config(plan, record)
        render(record, plan.output / "report.html")
        tracker.artifact(parent, plan.output / "report.html")
        tracker.artifact(parent, plan.output / "sweep.json")
        tracker.finish(parent, "finished")
    return record


def _start_tracking(plan: Plan, tracker: MlflowTracker) -> str:
    flush_spool(plan.tracker)
    tags = {"rayft.kind": "sweep", **{f"rayft.{name}": value for name, value in provenance().items()}}
    parent = tracker.run(plan.config.name, f"{plan.config.name}-{sweep_hash(plan.config)}", tags=tags)
    tracker.params(parent, leaves(plan.config) | {"data_digest": plan.parts.digest})
    return parent


def _track(plan: Plan, record: SweepRecord, tracker: MlflowTracker, parent: str) -> None:
    """Add scores to the trials' runs; baselines and squeezed adapters get runs of their own."""
    digest = {"data_digest": record.data_digest}
    shared = {k: v for k, v in leaves(plan.run).items() if k.startswith(("model.", "data.", "evaluate."))}
    for trial in record.trials:
        if trial.run_id and trial.test:
            tracker.params(trial.run_id, digest)
            # At step 0, as for what has no steps: MLflow compares such numbers as bars.
            tracker.metrics(trial.run_id, _scores(trial.test, trial.val_score))
    for base in record.baselines:
        run = tracker.run(base.name, f"{parent}-{base.name}", parent=parent, tags={"rayft.kind": "baseline"})
        tracker.params(run, {**shared, **digest, "method.name": base.name})
        tracker.metrics(run, _scores(base.test, base.val_score))
        tracker.finish(run, "finished")
    settings = {trial.id: trial.settings for trial in record.trials}
    for item in record.squeezed:
        # The rank first: MLflow's table cuts off the end of a name.
        shown = f"{item.name.removeprefix(item.trial)} of {item.trial}"
        run = tracker.run(shown, f"{parent}-{item.name}", parent=parent, tags={"rayft.kind": "squeezed"})
        own = {"method.name": "squeeze", "method.rank": str(item.rank), "squeezed_from": item.trial}
        tracker.params(run, {**settings[item.trial], **digest, **own})
        numbers: dict[str, float] = {"trainable_parameters": item.parameters, "adapter_bytes": item.bytes}
        numbers |= {"retained_energy_mean": item.energy_mean, "retained_energy_min": item.energy_min}
        tracker.metrics(run, {**(_scores(item.test, item.val_score) if item.test else {}), **numbers})
        tracker.artifact(run, item.folder, "adapter")
        tracker.finish(run, "finished")
    if record.winner:
        best = next(trial for trial in record.trials if trial.id == record.winner.trial)
        if best.test:
            tracker.metrics(parent, {f"best_{k}": v for k, v in _scores(best.test, best.val_score).items()})


def _scores(test: Score, val: float | None) -> dict[str, float]:
    numbers = {"test_score": test.value, "test_low": test.low, "test_high": test.high}
    return numbers if val is None else {**numbers, "val_score": val}


def _register(plan: Plan, record: SweepRecord, winner: Trial, display: Display) -> None:
    """Register the winner, columns sorted, so that every rank of it can be served; then the gate."""
    assert record.winner
    best = max((base.val_score or 0.0 for base in record.baselines), default=0.0)
    score = next(trial.val_score for trial in record.trials if trial.id == record.winner.trial)
    tags = {SCORE_TAG: repr(score), BASE_SCORE_TAG: repr(best), "data_digest": record.data_digest}
    try:
        registry = MlflowRegistry(plan.tracker.uri)
        version = registry.register(plan.config.name, winner.run_id, plan.output / "winner", tags)
    except TrackingError as error:
        display.say(
            f"not registered: {error}. Everything else is in {plan.output}; run the sweep again to register"
        )
        return
    try:
        done = promote(registry, plan.config.name, version, gate=plan.config.promote)
    except PromotionRefusedError as error:
        display.say(f"registered as {plan.config.name} version {version}, not promoted: {error}")
    else:
        display.say(f"registered as models:/{plan.config.name}@{done.alias} (version {done.version})")


def _write_serve_config(plan: Plan, record: SweepRecord) -> None:
    """Write what `rayft serve` needs: the winner at every rank, and the best of each other method."""
    adapters = served_adapters(plan.output, record)
    if not adapters or plan.config.model.task != "causal_lm":
        return
    serve = plan.config.serve
    content = {
        "model": plan.config.model.model_dump(),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "host": serve.host,
        "port": serve.port,
        "cpus": serve.cpus,
    }
    (plan.output / "serve.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def served_adapters(output: Path, record: SweepRecord) -> Mapping[str, Path]:
    """Name what is worth serving: the winner, its squeezed ranks, and the best trial of other methods."""
    if record.winner is None or not (output / "winner").is_dir():
        return {}
    winner = next(trial for trial in record.trials if trial.id == record.winner.trial)
    adapters = {record.name: output / "winner"}
    others = [
        trial
        for trial in record.trials
        if trial.status == "finished" and trial.method != winner.method and method(trial.method).exports_lora
    ]
    for name in sorted({trial.method for trial in others}):
        best = min((t for t in others if t.method == name), key=lambda t: t.last_val_loss or float("inf"))
        # The name of a served model holds no colon, and `peft:LoRA` does.
        adapters[f"{record.name}-{name.replace(':', '-')}"] = Path(best.folder)
    return adapters


def _line(trial: Trial) -> str:
    if trial.result is None:
        return f"{trial.point.name}: failed, {trial.error.splitlines()[0]}"
    return (
        f"{trial.point.name}: {trial.status} at step {trial.result['steps']}, "
        f"val loss {trial.result['val_loss']:.3f}, overhead {trial.result['seconds']['overhead']:.2f} s"
    )

"""From a configuration to a squeezed, scored, registered and reported winner."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray
import yaml

from rayft.analysis.record import SweepAnalysis
from rayft.artifacts import AdapterArtifact
from rayft.config import leaves
from rayft.errors import (
    ArtifactError,
    DiskFullError,
    PromotionRefusedError,
    RayftError,
    RegistryError,
    ReportError,
    ResourceError,
    TrackingError,
)
from rayft.files import room_on, write_file
from rayft.flow import scoring
from rayft.flow.analyze.run import analyze_items, known, summarize
from rayft.flow.analyze.source import Item
from rayft.flow.analyze.tracking import track_analysis
from rayft.flow.cluster import check_tracking, cluster, join, placed, temporary_folders
from rayft.flow.config import PipelineConfig
from rayft.flow.display import Display
from rayft.flow.hold import hold
from rayft.flow.interrupt import interrupts
from rayft.flow.lanes import at_work
from rayft.flow.scores import ScoreStore
from rayft.flow.scoring import Measured
from rayft.flow.squeeze import make as squeezing
from rayft.flow.squeeze.dense import dense_source, extract, lost_text
from rayft.flow.squeeze.make import Source, SqueezedAdapter
from rayft.flow.squeeze.tracking import score_metrics, track_squeezed
from rayft.flow.sweep.preflight import Plan, preflight
from rayft.flow.sweep.record import build_record, with_run_ids
from rayft.methods import method
from rayft.paths import runs_folder
from rayft.registry.promote import promote
from rayft.registry.ref import BASE_SCORE_TAG, SCORE_TAG
from rayft.registry.store import MlflowRegistry
from rayft.report.record import SweepRecord
from rayft.report.render import render
from rayft.serving.deployment import deployment
from rayft.sweep.executor import EXECUTORS, Executor
from rayft.sweep.lane import tracking_key
from rayft.sweep.result import damage
from rayft.sweep.score import spread
from rayft.sweep.tuner import Trial, search
from rayft.tracking.base import PENDING, Former, RunStatus
from rayft.tracking.mlflow import MlflowTracker, flush_spool, resolve_runs
from rayft.tracking.provenance import provenance
from rayft.train.context import trial_folder

__all__ = ["run_sweep", "served_adapters", "start_tracking"]

logger = logging.getLogger(__name__)

DEPLOY_HEADER = """\
# For `serve deploy` on the cluster (RAY_DASHBOARD_ADDRESS says where that is); every sweep writes it anew.
# To let callers in from elsewhere, copy this file, give `args` some `keys`, and set both `host`s.
"""


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

    A sweep that was interrupted goes on: finished trials are not trained again. The analysis, which can take
    longer than all else, comes when the winner is registered and reported.

    Interrupted by a KeyboardInterrupt, it has its trials save checkpoints, marks its runs as interrupted, and
    raises that on.

    Raises:
        RayftError: if a check fails (before anything is started) or a stage can't be done.
    """
    config = placed(config)
    with hold(config.folder, "--set output=…"):
        return _run_sweep(config, display)


def _run_sweep(config: PipelineConfig, display: Display) -> SweepRecord:
    """Run all stages in a folder that is held."""
    with display.stage("checks"):
        # A cluster that is there already costs nothing to join, and tells which devices there are.
        join()
        plan = preflight(config)
    for text in (*(item.text for item in plan.parts.dropped), *(f"warning: {one}" for one in plan.warnings)):
        display.say(text)
    tracker = MlflowTracker(plan.tracker)
    parent = start_tracking(plan, tracker)
    try:
        with room_on(plan.output, others=temporary_folders()):
            record = _run_stages(plan, display, tracker, parent)
            tracker.finish(parent, "finished")
    except KeyboardInterrupt:
        _record_end(tracker, parent, "interrupted")
        raise
    except BaseException:
        _record_end(tracker, parent, "failed")
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


def _record_end(tracker: MlflowTracker, parent: str, status: RunStatus) -> None:
    """Record how a sweep ended that did not finish; where there is no space for it, the next start does."""
    with suppress(ResourceError):
        tracker.finish(parent, status)


def _interrupt_runs(plan: Plan, tracker: MlflowTracker, parent: str, trials: Sequence[str]) -> None:
    """Record that the sweep's run, and those of the trials that are training, are interrupted."""
    _record_end(tracker, parent, "interrupted")
    waiting = [PENDING + tracking_key(key, plan.identity) for key in trials]
    for run_id in resolve_runs(plan.tracker, waiting).values():
        if not run_id.startswith(PENDING):
            with suppress(ResourceError):
                tracker.finish(run_id, "interrupted", if_running=True)


def _run_stages(plan: Plan, display: Display, tracker: MlflowTracker, parent: str) -> SweepRecord:
    """Run the stages that need a cluster, and those that follow from them."""
    sweep, scale = plan.config.sweep, plan.run.scale
    analysis: SweepAnalysis | None = None
    with cluster(sweep.lanes * scale.workers, device=scale.device, gpu_share=scale.gpu_share):
        check_tracking(plan.tracker)
        executor = EXECUTORS[plan.executor](
            scale, str(plan.output / "ray"), sweep.lanes, sweep.restarts, plan.config.name, sweep.patience
        )
        with at_work(executor, display, lambda trials: _interrupt_runs(plan, tracker, parent, trials)):
            found = _measure(plan, executor, display, parent)
            with display.stage("register and report"):
                record = _report(plan, found, display, tracker, parent)
            if plan.config.analyze.parts and found.winner:
                with display.stage("analyse"), display.watch(executor.broker):
                    analysis = _analyze(plan, executor, found.trials, record, display)
        if analysis is not None:
            with display.stage("report the analysis"):
                record = _report_analysis(plan, record, analysis, display, tracker, parent)
    return record


def _measure(plan: Plan, executor: Executor, display: Display, parent: str) -> _Findings:
    """Run the stages that need workers."""
    found = _Findings()
    names = {point.key: point.name for point in plan.points}
    store = ScoreStore(plan.output / "scores", display.say)
    with (
        display.stage("start workers, score the base"),
        display.watch(executor.broker, lambda key: names.get(key, key)),
    ):
        found.baselines = scoring.score_baselines(plan, executor, store)
    scoring.say_unscored(found.baselines, display.say)
    with (
        display.stage(f"search ({len(plan.points)} trials)"),
        display.watch(executor.broker, lambda key: names.get(key, key)),
    ):
        found.trials = search(
            plan.config.sweep, plan.points, executor, plan.output, tracker=plan.tracker, parent=parent,
            identity=plan.identity, check=interrupts.check,
        )  # fmt: skip
    found.trials = _with_runs(plan, found.trials)
    for trial in found.trials:
        display.say(_line(trial))
    with display.stage("score the trials"), display.watch(executor.broker):
        found.scores = scoring.score_trials(plan, executor, found.trials, store)
        found.trials = scoring.marked(found.trials, found.scores)
        ranking = _intact(plan, found, scoring.best_first(plan, found.trials, found.scores))
        found.winner = ranking[0] if ranking else None
    for trial in found.trials:
        if trial.result and trial.error:
            display.say(_line(trial))
    if found.winner and _can_be_squeezed(found.winner):
        with display.stage("squeeze"), display.watch(executor.broker, lambda key: names.get(key, key)):
            _squeeze(plan, executor, found, ranking, display, store)
    return found


def _intact(plan: Plan, found: _Findings, ranking: list[Trial]) -> list[Trial]:
    """Leave out the best trials if their adapters were damaged since they were scored, and mark them."""
    while ranking and (problem := damage(trial_folder(plan.output, ranking[0].point.key))):
        found.scores[ranking[0].point.name] = Measured(error=problem)
        found.trials = scoring.marked(found.trials, found.scores)
        ranking = ranking[1:]
    return ranking


def _analyze(
    plan: Plan, executor: Executor, trials: list[Trial], record: SweepRecord, display: Display
) -> SweepAnalysis:
    """Analyse what the finished trials saved."""
    items = [
        Item(trial.point.name, trial.point.run, Path(trial.result["folder"]), trial.run_id, plan.identity)
        for trial in trials
        if trial.result and trial.status == "finished"
    ]
    config = plan.config.analyze
    found = analyze_items(executor, items, config, plan.output, display.say)
    return summarize(items, found, config, *known(record))


def _can_be_squeezed(trial: Trial) -> bool:
    """Tell whether a trial left a LoRA, or something that one can be extracted from."""
    assert trial.result is not None
    lora = method(trial.point.run.method.name).exports_lora
    try:
        return lora or dense_source(Path(trial.result["folder"])) is not None
    except ArtifactError:
        return False


def _squeeze(
    plan: Plan,
    executor: Executor,
    found: _Findings,
    ranking: list[Trial],
    display: Display,
    store: ScoreStore,
) -> None:
    """Bring the best trials to lower ranks, train those on if asked to, and score them all.

    A trial whose adapter can't be read any more is left out.
    """
    config = plan.config.squeeze
    for trial in [trial for trial in ranking if _can_be_squeezed(trial)][: config.winners]:
        assert trial.result is not None
        folder = plan.output / "squeezed"
        if trial is not found.winner:
            folder /= trial.point.key
        source = Source(trial.point.name, trial.point.key, trial.point.run, trial.run_id, plan.identity)
        if not method(trial.point.run.method.name).exports_lora:
            found.squeezed += _extracted(plan, trial, source, folder, display)
            continue
        place = plan.output / "winner" if trial is found.winner else folder / "full"
        try:
            full = squeezing.sort_columns(trial.result["folder"], place)
        except ArtifactError as error:
            display.say(f"{trial.point.name} can't be squeezed, and is left out: {error}")
            continue
        if trial is found.winner:
            found.full = full
        found.squeezed += [
            squeezing.make(full, target, source, folder) for target in squeezing.targets(config, full.rank)
        ]
    if config.cont is not None:
        found.squeezed += squeezing.continue_all(
            executor, found.squeezed, config.cont, plan.output, plan.tracker, display.say
        )
    scores = squeezing.score(executor, found.squeezed, store=store)
    scoring.say_unscored(scores, display.say)
    found.squeezed = [item for item in found.squeezed if not scores[item.name].error]
    found.scores |= scores


def _extracted(
    plan: Plan, trial: Trial, source: Source, folder: Path, display: Display
) -> list[SqueezedAdapter]:
    """Make LoRAs of what a trial without factors added to the base; none where there is no way."""
    assert trial.result is not None
    dense, wanted = dense_source(Path(trial.result["folder"])), squeezing.targets(plan.config.squeeze, None)
    assert dense is not None
    made: list[SqueezedAdapter] = []
    # Each kind has an extraction of its own: so far as the highest rank, or as the highest energy asks for.
    for kind in (
        [target for target in wanted if target.energy is None],
        [target for target in wanted if target.energy is not None],
    ):
        if not kind:
            continue
        try:
            extraction = extract(dense, plan.config.model, kind, None, lambda _done: None)
            made += [squeezing.make(extraction.artifact, target, source, folder) for target in kind]
        except DiskFullError:
            raise
        except RayftError as error:
            display.say(f"no LoRA was extracted from {trial.point.name}: {error}")
            continue
        if lost := lost_text(extraction):
            display.say(f"{trial.point.name}: {lost}")
    return made


def _report(
    plan: Plan, found: _Findings, display: Display, tracker: MlflowTracker, parent: str
) -> SweepRecord:
    """Write the report and what `rayft serve` needs; then track, register and promote.

    What fails after the record is written is told and left to the next run of the same command, which finds
    all before it done.
    """
    record = build_record(
        plan, found.baselines, found.trials, found.scores, found.winner, found.full, found.squeezed,
        display.timings,
    )  # fmt: skip
    record.save(plan.output / "sweep.json")
    several_nodes = _several_nodes()
    if not several_nodes:
        with _late(plan, display, "serve.yaml was not written"):
            folders = served_adapters(plan.output, record)
            _write_serve_config(plan, {name: str(folder) for name, folder in folders.items()})
    _render(plan, record, display)
    record = _updated(plan, record, display)
    with _late(plan, display, "not all that was found is tracked"):
        _track(plan, record, found, tracker, parent)
    if found.winner and (found.full or _apart(found, record)):
        shipped = ""
        with _late(plan, display, "not registered"):
            shipped = _register(plan, record, found, display)
        if several_nodes:
            _serve_from_registry(plan, record, found, display, shipped)
    elif found.winner and found.winner.result:
        display.say(scoring.why_not_served(found.winner, found.trials, extracted=bool(found.squeezed)))
    _track_report(plan, display, tracker, parent)
    return record


def _several_nodes() -> bool:
    """Return whether the sweep runs on a cluster of several nodes, which do not have each other's files."""
    return ray.is_initialized() and spread()


@contextmanager
def _late(plan: Plan, display: Display, what: str) -> Iterator[None]:
    """Tell what fails in the block in one line, and go on: all that came before it is kept.

    Raises:
        DiskFullError: which leaves no room for what comes after, either.
    """
    try:
        with room_on(plan.output):
            yield
    except DiskFullError:
        raise
    except Exception as error:
        logger.debug("%s", what, exc_info=True)
        display.undone.append(what)
        name = "" if isinstance(error, RayftError) else f"{type(error).__name__}: "
        display.say(
            f"{what}: {name}{' '.join(str(error).split())}. Everything else is in {plan.output}; run the "
            "sweep again to do what is left, without training"
        )


def _report_analysis(
    plan: Plan,
    record: SweepRecord,
    analysis: SweepAnalysis,
    display: Display,
    tracker: MlflowTracker,
    parent: str,
) -> SweepRecord:
    """Add an analysis to the runs of what it is of, and to the report."""
    path = analysis.save(plan.output)
    record = with_run_ids(record, plan.tracker).model_copy(update={"timings": dict(display.timings)})
    record.save(plan.output / "sweep.json")
    _render(plan, record, display)
    with _late(plan, display, "not all of the analysis is tracked"):
        tracker.artifact(parent, path)
        runs = {trial.id: trial.run_id for trial in record.trials}
        track_analysis(tracker, analysis, runs, plan.output / "plots")
    _track_report(plan, display, tracker, parent)
    return record


def _render(plan: Plan, record: SweepRecord, display: Display) -> None:
    try:
        analysis = SweepAnalysis.find(plan.output)
    except ReportError:
        # Damaged, as was said before the start.
        analysis = None
    with _late(plan, display, "the report was not drawn"):
        render(record, plan.output / "report.html", analysis)


def _updated(plan: Plan, record: SweepRecord, display: Display) -> SweepRecord:
    """Return the record with the runs that MLflow has by now; write it and the report anew if it has more."""
    found = with_run_ids(record, plan.tracker)
    if found != record:
        found.save(plan.output / "sweep.json")
        _render(plan, found, display)
    return found


def _track_report(plan: Plan, display: Display, tracker: MlflowTracker, parent: str) -> None:
    with _late(plan, display, "the report is not tracked"):
        tracker.artifact(parent, plan.output / "sweep.json")
        if (plan.output / "report.html").is_file():
            tracker.artifact(parent, plan.output / "report.html")


def _with_runs(plan: Plan, trials: list[Trial]) -> list[Trial]:
    """Return trials with their runs on the server: those that MLflow has by now, also of failed trials."""
    known = {
        trial.point.key: trial.run_id
        or (PENDING + tracking_key(trial.point.key, plan.identity) if trial.result is None else "")
        for trial in trials
    }
    ids = resolve_runs(plan.tracker, list(known.values()))
    found = {key: ids[run_id] for key, run_id in known.items()}
    # Nothing is known of a failed trial beside its key: it may have been left before it had a run.
    lost = {t.point.key for t in trials if t.result is None and found[t.point.key].startswith(PENDING)}
    return [
        replace(trial, run_id="" if trial.point.key in lost else found[trial.point.key]) for trial in trials
    ]


def _sweep_key(plan: Plan) -> str:
    """Return the key of the sweep's run, which those of the runs below it begin with."""
    return f"{plan.config.name}-{plan.identity.sweep or plan.identity.inputs}"


def start_tracking(plan: Plan, tracker: MlflowTracker) -> str:
    """Create the sweep's run, or find it again where the sweep goes on; give its id."""
    flush_spool(plan.tracker)
    tags = {"rayft.kind": "sweep", **{f"rayft.{name}": value for name, value in provenance().items()}}
    former = None
    if plan.former_hash:
        former = Former(f"{plan.config.name}-{plan.former_hash}", {"data_digest": plan.parts.digest})
    parent = tracker.run(plan.config.name, _sweep_key(plan), tags=tags, former=former)
    data = {"data_digest": plan.parts.digest}
    if plan.parts.dropped:
        data["data_dropped"] = "\n".join(item.text for item in plan.parts.dropped)
    tracker.params(parent, leaves(plan.config) | data)
    return parent


def _track(plan: Plan, record: SweepRecord, found: _Findings, tracker: MlflowTracker, parent: str) -> None:
    """Add scores to the trials' runs; baselines and squeezed adapters get runs of their own."""
    digest = {"data_digest": record.data_digest}
    shared = {k: v for k, v in leaves(plan.run).items() if k.startswith(("model.", "data.", "evaluate."))}
    for trial in record.trials:
        if trial.run_id and trial.status == "failed":
            # Its process may have died without a word.
            tracker.finish(trial.run_id, "failed", if_running=True)
        if trial.run_id and trial.test:
            tracker.params(trial.run_id, digest)
            tracker.metrics(trial.run_id, score_metrics(found.scores[trial.id]))
    for base in record.baselines:
        run = tracker.run(
            base.name, f"{_sweep_key(plan)}-{base.name}", parent=parent, tags={"rayft.kind": "baseline"},
            former=Former(f"{parent}-{base.name}"), restart=False,
        )  # fmt: skip
        tracker.params(run, {**shared, **digest, "method.name": base.name})
        tracker.metrics(run, score_metrics(found.baselines[base.name]))
        tracker.finish(run, "finished")
    settings = {trial.id: trial.settings for trial in record.trials}
    sizes = {trial.id: trial.bytes for trial in record.trials}
    for item in found.squeezed:
        track_squeezed(
            tracker,
            item,
            parent=item.source.run_id or parent,
            settings=settings[item.source.name],
            data=digest,
            after=found.scores[item.name],
            before=found.scores[item.source.name],
            source_bytes=sizes[item.source.name],
            plots=plan.output / "plots",
        )
    if record.winner:
        best = next(trial for trial in record.trials if trial.id == record.winner.trial)
        if best.test:
            tracker.metrics(parent, score_metrics(found.scores[best.id], "best_"))


def _register(plan: Plan, record: SweepRecord, found: _Findings, display: Display) -> str:
    """Register what is to be shipped, then the gate; return the version as `models:/NAME/VERSION`.

    That is the winner, columns sorted, so that every rank of it can be served; or a squeezed adapter that is
    no view of it.

    Raises:
        RayftError: if it can't be registered now.
    """
    assert record.winner
    shipped = _apart(found, record)
    folder, name = (
        (shipped.folder, shipped.name) if shipped else (plan.output / "winner", record.winner.trial)
    )
    version = _register_as(plan.config.name, plan, record, found, folder, record.winner.trial, name)
    registry = MlflowRegistry(plan.tracker.uri)
    refused = f"registered as {plan.config.name} version {version}, not promoted"
    with _late(plan, display, refused):
        try:
            done = promote(registry, plan.config.name, version, gate=plan.config.promote)
        except PromotionRefusedError as error:
            display.say(f"{refused}: {error}")
        else:
            display.say(f"registered as models:/{plan.config.name}@{done.alias} (version {done.version})")
    return f"models:/{plan.config.name}/{version}"


def _register_as(
    registered: str,
    plan: Plan,
    record: SweepRecord,
    found: _Findings,
    folder: str | Path,
    trial_id: str,
    scored: str,
) -> int:
    """Register an adapter, or find the version that has the same content; return the version.

    Args:
        registered: name of the registered model.
        plan: the sweep's.
        record: with the runs of the trials.
        found: with the scores.
        folder: the adapter's.
        trial_id: id of the trial with whose run the files are kept.
        scored: name of the adapter's scores.

    Raises:
        RayftError: if it can't be registered now.
    """
    best = max((base.val_score or 0.0 for base in record.baselines), default=0.0)
    tags = {SCORE_TAG: repr(found.scores[scored].mean("val")), "data_digest": record.data_digest}
    if not any(measured.error for measured in found.baselines.values()):
        # Where a baseline could not be scored, the gate has nothing to compare with.
        tags[BASE_SCORE_TAG] = repr(best)
    run_id = next(trial.run_id for trial in record.trials if trial.id == trial_id)
    if run_id.startswith(PENDING):
        raise TrackingError(f"MLflow does not have the run of {trial_id} yet, which began while it was away")
    return MlflowRegistry(plan.tracker.uri).register(registered, run_id, folder, tags)


def _serve_from_registry(
    plan: Plan, record: SweepRecord, found: _Findings, display: Display, shipped: str
) -> None:
    """Write what `rayft serve` and `serve deploy` need on a cluster of several nodes.

    Other nodes do not have the sweep's folders, so each adapter is named as a version of the registry, where
    those that are not shipped are registered under names of their own, without an alias. What can't be
    registered is left out, which is told.

    Args:
        plan: the sweep's.
        record: with the runs of the trials.
        found: with the scores.
        display: hears of what is left out.
        shipped: the version that was registered to be shipped; empty if that failed.
    """
    sources: dict[str, str] = {}
    problems: dict[str, Exception] = {}
    for item in _servable(plan.output, record):
        if item.shipped and shipped:
            sources[item.name] = shipped
        elif item.shipped:
            problems[item.name] = RegistryError("it is not registered")
        else:
            try:
                with room_on(plan.output):
                    version = _register_as(
                        item.registered, plan, record, found, item.folder, item.trial, item.trial
                    )
                sources[item.name] = f"models:/{item.registered}/{version}"
            except DiskFullError:
                raise
            except Exception as error:  # noqa: BLE001  (whatever it is, it is told below)
                problems[item.name] = error
    if sources:
        with _late(plan, display, "serve.yaml was not written"):
            _write_serve_config(plan, sources, plan.tracker.uri)
            display.say(f"to serve the result on this cluster: serve deploy {plan.output / 'deploy.yaml'}")
    if problems:
        with _late(plan, display, f"serve.yaml leaves out {', '.join(problems)}"):
            raise next(iter(problems.values()))


def _apart(found: _Findings, record: SweepRecord) -> SqueezedAdapter | None:
    """Give the squeezed adapter to ship, if it is no view of the winner: trained on, or extracted."""
    ship = record.winner.ship if record.winner else ""
    mine = (item for item in found.squeezed if item.how == "cont" or not found.full)
    return next((item for item in mine if item.name == ship), None)


def _fetched() -> Path:
    """Return a folder for served adapters: `serve deploy` gives a server no working directory to rely on."""
    return runs_folder(cluster=True).absolute() / "serving" / "adapters"


def _write_serve_config(plan: Plan, sources: Mapping[str, str], registry: str | None = None) -> None:
    """Write what `rayft serve` needs, and for a cluster also what `serve deploy` needs.

    Args:
        plan: the sweep's.
        sources: served name → adapter folder, or `models:/…`.
        registry: MLflow's URI, for `models:/…`.
    """
    if not sources or plan.config.model.task != "causal_lm":
        return
    serve = plan.config.serve
    content = {
        "model": plan.config.model.model_dump(),
        "adapters": dict(sources),
        **({"registry": registry, "fetched": str(_fetched())} if registry else {}),
        "host": serve.host,
        "port": serve.port,
        "cpus": serve.cpus,
    }
    write_file(plan.output / "serve.yaml", yaml.safe_dump(content, sort_keys=False))
    if registry:
        deployed = yaml.safe_dump(deployment(content), sort_keys=False)
        write_file(plan.output / "deploy.yaml", DEPLOY_HEADER + deployed)


@dataclass(frozen=True)
class _Servable:
    """An adapter that is worth serving."""

    name: str
    """What it is served as."""
    folder: Path
    trial: str
    """Id of the trial that it comes from."""
    registered: str
    """Registered model that it is a version of."""
    shipped: bool = False
    """Whether it is what the sweep ships, which is registered under the sweep's own name."""


def served_adapters(output: Path, record: SweepRecord) -> Mapping[str, Path]:
    """Name what is worth serving: the winner, its squeezed ranks, and the best trial of other methods."""
    return {item.name: item.folder for item in _servable(output, record)}


def _servable(output: Path, record: SweepRecord) -> list[_Servable]:
    """List what is worth serving, the winner first; its squeezed ranks are views of it."""
    if record.winner is None:
        return []
    winner = next(trial for trial in record.trials if trial.id == record.winner.trial)
    ship = next((item for item in record.squeezed if item.name == record.winner.ship), None)
    viewed = method(winner.method).exports_lora
    main = output / "winner" if viewed else Path(ship.folder) if ship else None
    if main is None or not main.is_dir():
        return []
    trained_on = viewed and ship is not None and ship.how == "cont"
    # The name of a served or registered model holds no colon, and `peft:LoRA` does.
    own = f"{record.name}-{winner.method.replace(':', '-')}" if trained_on else record.name
    found = [_Servable(record.name, main, winner.id, own, shipped=not trained_on)]
    if trained_on and ship is not None:
        # No view of the winner, so it has a name of its own.
        name = f"{record.name}-{ship.name.rpartition('@')[2].replace('+', '-cont')}"
        found.append(_Servable(name, Path(ship.folder), winner.id, record.name, shipped=True))
    others = [
        trial
        for trial in record.trials
        if trial.status == "finished" and trial.method != winner.method and method(trial.method).exports_lora
    ]
    for name in sorted({trial.method for trial in others}):
        best = min((t for t in others if t.method == name), key=lambda t: t.last_val_loss or float("inf"))
        served = f"{record.name}-{name.replace(':', '-')}"
        found.append(_Servable(served, Path(best.folder), best.id, served))
    return found


def _line(trial: Trial) -> str:
    if trial.result is None or trial.error:
        return f"{trial.point.name}: failed, {trial.error.splitlines()[0]}"
    return (
        f"{trial.point.name}: {trial.status} at step {trial.result['steps']}, "
        f"val loss {trial.result['val_loss']:.3f}, overhead {trial.result['seconds']['overhead']:.2f} s"
    )

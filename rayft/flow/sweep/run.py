"""Run a sweep: search, score, squeeze, register and report, then analyse."""

from __future__ import annotations

from pathlib import Path

import ray

from rayft.analysis.record import SweepAnalysis
from rayft.errors import ArtifactError, DiskFullError, RayftError
from rayft.files import room_on
from rayft.flow import scoring
from rayft.flow.ahead import Ahead
from rayft.flow.analyze.run import analyze_items
from rayft.flow.analyze.source import Item
from rayft.flow.analyze.summarize import known, summarize
from rayft.flow.cluster import check_tracking, join, placed, temporary_folders
from rayft.flow.config import PipelineConfig
from rayft.flow.display import Display
from rayft.flow.hold import hold
from rayft.flow.interrupt import interrupts
from rayft.flow.lanes import executor_for, use_lanes
from rayft.flow.scoring import Measured, ScoreStore
from rayft.flow.selection import best_first, candidates
from rayft.flow.squeeze.continued import continue_all
from rayft.flow.squeeze.dense import dense_source, extract, lost_text
from rayft.flow.squeeze.make import Source, SqueezedAdapter, make, sort_columns, targets
from rayft.flow.sweep.preflight import Plan, preflight
from rayft.flow.sweep.publish import Publisher
from rayft.flow.sweep.record import Findings
from rayft.flow.sweep.tracking import SweepTracking
from rayft.models.methods import method
from rayft.report.record import SweepRecord
from rayft.sweep.decisions import rungs
from rayft.sweep.executor import Executor
from rayft.sweep.result import damage, trial_folder
from rayft.sweep.search import Trial, search
from rayft.tracking.mlflow import MlflowTracker, flush_spool
from rayft.train.trainer import evaluation_steps

__all__ = ["checked", "patience_text", "run_sweep"]


def run_sweep(config: PipelineConfig, display: Display, lanes: Ahead | None = None) -> SweepRecord:
    """Run all stages of a sweep; return when the lanes have ended and their memory is free.

    An interrupted sweep continues: finished trials are not trained again. The analysis comes after the winner
    is registered and reported, because it can take longer than everything else.

    On KeyboardInterrupt the trials save checkpoints and the tracked runs are marked as interrupted; then the
    exception is raised again.

    Args:
        config: the sweep's.
        display: shows the stages and the trials.
        lanes: lanes that have been started for the sweep; otherwise they are started after the checks.

    Raises:
        RayftError: if a check fails, before anything is done, or if a stage fails.
    """
    config = placed(config)
    with hold(config.folder, "--set output=…"):
        plan = checked(config, display)
        display.say(scoring.questions_text(plan))
        if doubt := patience_text(plan):
            display.say(f"warning: {doubt}")
        tracker = MlflowTracker(plan.tracker)
        try:
            record = _tracked(plan, display, tracker, lanes)
        finally:
            tracker.close()
        left = flush_spool(plan.tracker).pending
    if left:
        display.say(
            f"the tracking server does not answer: {left} records are kept in {plan.tracker.spool}; "
            f"`rayft report {plan.output}` sends them"
        )
    return record


def patience_text(plan: Plan) -> str:
    """Return why `evaluate.patience` can end no trial early; empty if it can, or is not set."""
    run, patience = plan.run, plan.run.evaluate.patience
    every = evaluation_steps(run, rungs(plan.config.sweep, run.optim.steps))
    before = len(every - {run.optim.steps})
    # The first evaluation always brings the least loss so far.
    if patience is None or before > patience:
        return ""
    return (
        f"evaluate.patience is {patience}, but trials are evaluated {before} times before their last step, "
        f"so it ends none early; set evaluate.every for more than {patience} evaluations"
    )


def checked(config: PipelineConfig, display: Display) -> Plan:
    """Check everything that can be checked before workers start, show the warnings, and return the plan.

    Raises:
        RayftError: as `preflight`.
    """
    with display.stage("check, and prepare the data"):
        # Joining an existing cluster costs nothing, and shows which devices it has.
        join()
        plan = preflight(config)
    for text in (*(item.text for item in plan.parts.dropped), *(f"warning: {one}" for one in plan.warnings)):
        display.say(text)
    return plan


def _tracked(plan: Plan, display: Display, tracker: MlflowTracker, lanes: Ahead | None) -> SweepRecord:
    """Run the stages after the checks, and track how they ended."""
    tracking = SweepTracking(plan, tracker)
    try:
        with room_on(plan.output, others=temporary_folders()):
            record = _run_stages(plan, display, tracking, lanes)
            tracker.finish(tracking.run_id, "finished")
    except KeyboardInterrupt:
        tracking.end("interrupted")
        raise
    except BaseException:
        tracking.end("failed")
        raise
    return record


def _run_stages(plan: Plan, display: Display, tracking: SweepTracking, lanes: Ahead | None) -> SweepRecord:
    """Run the stages that need a cluster, and publish what they find."""
    publisher = Publisher(plan, display, tracking)
    analysis: SweepAnalysis | None = None
    with executor_for(plan, lanes, plan.config.sweep.lanes) as executor:
        check_tracking(plan.tracker)
        with use_lanes(executor, display, tracking.interrupt):
            stages = _Stages(plan, executor, display, tracking)
            found = stages.run()
            with display.stage("register and report"):
                record = publisher.publish(found)
            if plan.config.analyze.parts and found.winner:
                with display.stage("analyse"), display.watch(executor.broker, stages.name):
                    analysis = stages.analyze(record)
        if analysis is not None:
            with display.stage("report the analysis"):
                record = publisher.add_analysis(record, analysis)
    return record


class _Stages:
    """The stages that need lanes: search, score the base and the trials, squeeze, analyse."""

    def __init__(self, plan: Plan, executor: Executor, display: Display, tracking: SweepTracking) -> None:
        self._plan, self._executor, self._display, self._tracking = plan, executor, display, tracking
        self._store = ScoreStore(plan.output / "scores", display.say)
        self._names = {point.key: point.name for point in plan.points}
        self._found = Findings()

    def run(self) -> Findings:
        """Run all stages except the analysis, and return what they found."""
        self._search()
        ranking = self._score()
        if self._found.winner and _can_be_squeezed(self._found.winner):
            with self._display.stage("squeeze"), self._display.watch(self._executor.broker, self.name):
                self._squeeze(ranking)
        self._found.spent = ray.get(self._executor.broker.spent.remote())
        return self._found

    def name(self, key: str) -> str:
        """Return the name of the trial with a key; any other key as it is."""
        return self._names.get(key, key)

    def _search(self) -> None:
        plan, display = self._plan, self._display
        count = f"{len(plan.points)} trial{'s' if len(plan.points) > 1 else ''}"
        with (
            display.stage(f"start workers, search ({count})"),
            display.watch(self._executor.broker, self.name),
        ):
            trials = search(
                plan.config.sweep, plan.points, self._executor, plan.output, tracker=plan.tracker,
                parent=self._tracking.run_id, identity=plan.identity, check=interrupts.check,
            )  # fmt: skip
        self._found.trials = self._tracking.with_runs(trials)
        for trial in self._found.trials:
            display.say(_line(trial))

    def _score(self) -> list[Trial]:
        """Score the base and the trials, and choose the winner; return those that can win, the best first."""
        plan, display, found = self._plan, self._display, self._found
        with display.stage("score the base and the trials"), display.watch(self._executor.broker, self.name):
            able = candidates(found.trials)
            found.baselines, found.scores = scoring.score_sweep(
                plan, self._executor, found.trials, able, self._store, display.say
            )
            found.trials = scoring.marked(found.trials, found.scores)
            ranking = self._intact(best_first(found.trials, found.scores, plan.config.sweep.select_by))
            found.winner = ranking[0] if ranking else None
        scoring.say_unscored(found.baselines, display.say)
        for trial in found.trials:
            if trial.result and trial.error:
                display.say(_line(trial))
        return ranking

    def _intact(self, ranking: list[Trial]) -> list[Trial]:
        """Drop the best trials whose adapters were damaged after scoring, and mark them as failed."""
        found, output = self._found, self._plan.output
        while ranking and (problem := damage(trial_folder(output, ranking[0].point.key))):
            found.scores[ranking[0].point.name] = Measured(error=problem)
            found.trials = scoring.marked(found.trials, found.scores)
            ranking = ranking[1:]
        return ranking

    def _squeeze(self, ranking: list[Trial]) -> None:
        """Squeeze the best trials, train the results further if asked to, and score them all.

        A trial whose adapter can no longer be read is left out.
        """
        plan, found, config = self._plan, self._found, self._plan.config.squeeze
        for trial in [trial for trial in ranking if _can_be_squeezed(trial)][: config.winners]:
            found.squeezed += self._squeezed(trial)
        if config.cont is not None:
            found.squeezed = [
                *found.squeezed,
                *continue_all(
                    self._executor, found.squeezed, config.cont, plan.output, plan.tracker, self._display.say
                ),
            ]
        scores = {item.name: Measured() for item in found.squeezed}
        if plan.parts.asks:
            scores = scoring.score_squeezed(self._executor, found.squeezed, store=self._store)
        scoring.say_unscored(scores, self._display.say)
        found.squeezed = [item for item in found.squeezed if not scores[item.name].error]
        found.scores |= scores

    def _squeezed(self, trial: Trial) -> list[SqueezedAdapter]:
        """Squeeze a trial to all targets; return nothing if its adapter can no longer be read."""
        assert trial.result is not None
        plan, wins = self._plan, trial is self._found.winner
        folder = plan.output / "squeezed" if wins else plan.output / "squeezed" / trial.point.key
        source = Source(trial.point.name, trial.point.key, trial.point.run, trial.run_id, plan.identity)
        if not method(trial.point.run.method.name).exports_lora:
            return self._extracted(trial, source, folder)
        try:
            full = sort_columns(trial.result.folder, plan.output / "winner" if wins else folder / "full")
        except ArtifactError as error:
            self._display.say(f"{trial.point.name} can't be squeezed, and is left out: {error}")
            return []
        if wins:
            self._found.full = full
        wanted = targets(plan.config.squeeze, full.rank)
        return [make(full, target, source, folder) for target in wanted]

    def _extracted(self, trial: Trial, source: Source, folder: Path) -> list[SqueezedAdapter]:
        """Extract LoRAs from the update of a trial without low-rank factors; return those that succeed."""
        assert trial.result is not None
        dense = dense_source(Path(trial.result.folder))
        wanted = targets(self._plan.config.squeeze, None)
        assert dense is not None
        made: list[SqueezedAdapter] = []
        # Ranks and energies are extracted separately, each up to the highest that is asked for.
        for kind in (
            [target for target in wanted if target.energy is None],
            [target for target in wanted if target.energy is not None],
        ):
            if not kind:
                continue
            try:
                extraction = extract(dense, self._plan.config.model, kind, None, lambda _done: None)
                made += [make(extraction.artifact, target, source, folder) for target in kind]
            except DiskFullError:
                raise
            except RayftError as error:
                self._display.say(f"no LoRA was extracted from {trial.point.name}: {error}")
                continue
            if lost := lost_text(extraction):
                self._display.say(f"{trial.point.name}: {lost}")
        return made

    def analyze(self, record: SweepRecord) -> SweepAnalysis:
        """Analyse what the trials that can win have saved."""
        plan = self._plan
        items = [
            Item(trial.point.name, trial.point.run, Path(trial.result.folder), trial.run_id, plan.identity)
            for trial in candidates(self._found.trials)
            if trial.result
        ]
        config = plan.config.analyze
        found = analyze_items(self._executor, items, config, plan.output, self._display.say)
        return summarize(items, found, config, *known(record))


def _can_be_squeezed(trial: Trial) -> bool:
    """Return whether a trial has saved a LoRA, or something that a LoRA can be extracted from."""
    assert trial.result is not None
    lora = method(trial.point.run.method.name).exports_lora
    try:
        return lora or dense_source(Path(trial.result.folder)) is not None
    except ArtifactError:
        return False


def _line(trial: Trial) -> str:
    if trial.result is None or trial.error:
        return f"{trial.point.name}: failed, {trial.error.splitlines()[0]}"
    return (
        f"{trial.point.name}: {trial.status} at step {trial.result.steps}, "
        f"val loss {trial.result.val_loss:.3f}, overhead {trial.result.seconds['overhead']:.2f} s"
    )

"""`rayft train`: one run, trained, tracked and scored as a sweep does it with a trial, without a search.

A run is a sweep of one trial that no search stops. So it has a sweep's folder, checks, lanes and checkpoints,
and the same command continues it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rayft.artifacts import AdapterArtifact
from rayft.config import parse
from rayft.errors import ConfigError, TrainError
from rayft.files import room_on
from rayft.flow.ahead import Ahead
from rayft.flow.cluster import check_tracking, has_gpus, join, placed, temporary_folders
from rayft.flow.config import PipelineConfig, TrainConfig
from rayft.flow.display import Display
from rayft.flow.hold import hold
from rayft.flow.lanes import executor_for, use_lanes
from rayft.flow.origin import find_folder
from rayft.flow.scoring import Measured, ScoreStore, score_trials
from rayft.flow.squeeze.make import sort_columns
from rayft.flow.squeeze.tracking import score_metrics
from rayft.flow.sweep.preflight import Plan
from rayft.flow.sweep.run import checked
from rayft.flow.target import is_registered, split_rank
from rayft.methods.section import MethodConfig
from rayft.models.methods import method
from rayft.paths import read_path
from rayft.peft.folder import load_adapter
from rayft.sweep.executor import Executor
from rayft.sweep.jobs import Job
from rayft.sweep.request import TrainRequest
from rayft.sweep.result import TrialResult
from rayft.sweep.search import Trial, earlier
from rayft.sweep.space import MethodSpace, points
from rayft.tracking.mlflow import MlflowTracker, flush_spool, resolve_runs
from rayft.train.run import RunConfig
from rayft.train.trainer import TrainResult

__all__ = ["Trained", "as_sweep", "ignored_space", "train_run"]

HOW = {"executor", "restarts", "silence_seconds", "hang_seconds"}
"""Settings of `sweep` that a run has, too."""
EVALUATIONS = 10
"""How often a run is evaluated, and may write a checkpoint, if `evaluate.every` is not set."""


@dataclass(frozen=True)
class Trained:
    """What a run has left."""

    folder: Path
    """The output folder."""
    adapter: Path
    """Folder of the adapter, or of the whole model if the method trains that."""
    result: TrainResult
    scores: Measured
    """Scores on the validation and test parts; empty for raw text, which has no answers to score."""
    run_id: str
    """The run in MLflow."""
    before: bool
    """Whether an earlier command had trained it, so that this one only read the result."""


def as_sweep(config: TrainConfig, gpus: bool | None = None) -> PipelineConfig:
    """Return the sweep whose only trial is the run that a configuration describes.

    Args:
        config: the configuration.
        gpus: whether the workers will have GPUs; by default, whether this machine has one.

    Raises:
        ConfigError: if there is no `method` and `sweep` has several trials; or if the adapter in `start` has
            another rank than `method`.
        MethodError: if there is no such method.
    """
    values = config.model_dump(mode="json")
    if config.method is None and config.sweep is not None:
        trials = points(config.sweep, config.run(gpus))
        if len(trials) > 1:
            first = trials[0].run
            raise ConfigError(
                f"the configuration has no method, and its sweep has {len(trials)} trials, of which "
                f"`rayft train` can't choose one: set the method, such as --set method.name="
                f"{first.method.name} --set method.rank={first.method.rank} --set optim.lr="
                f"{first.optim.lr:g}, or search with `rayft sweep`"
            )
        return parse(PipelineConfig, values)
    chosen = config.method or MethodConfig()
    method(chosen.name)
    space = {
        name: value
        for name, value in chosen.model_dump(mode="json").items()
        if name in MethodSpace.model_fields
    }
    space |= {"ranks": [_rank(config, chosen)], "lr": [config.optim.lr], "anneal": values["anneal"]}
    how = {} if config.sweep is None else config.sweep.model_dump(include=HOW)
    values["sweep"] = {**how, "methods": {chosen.name: space}, "seeds": [config.seed]}
    return parse(PipelineConfig, values)


def _rank(config: TrainConfig, chosen: MethodConfig) -> int:
    """Return the rank of a run; that of the adapter that it starts from, if no other is set."""
    if config.start is None:
        return chosen.rank
    rank = AdapterArtifact.load(Path(config.start).expanduser()).rank
    if "rank" in chosen.model_fields_set and chosen.rank != rank:
        # A squeeze only lowers ranks.
        squeeze = (
            f", or `rayft squeeze` the adapter to rank {chosen.rank} first" if chosen.rank < rank else ""
        )
        raise ConfigError(
            f"start: {config.start} has rank {rank}, and method.rank is {chosen.rank}; set method.rank: "
            f"{rank}{squeeze}"
        )
    return rank


def start_folder(text: str, option: str) -> Path:
    """Return the folder of the adapter that a run goes on from, which may be an output folder.

    Args:
        text: what the user wrote.
        option: where, for messages.

    Raises:
        ConfigError: if it is no folder, but a registered adapter or one at a rank. Workers read the adapter
            whenever the run continues, so it has to stay.
    """
    name, rank = split_rank(text)
    if is_registered(name) or rank is not None:
        to = "RANK" if rank is None else rank
        raise ConfigError(
            f"{option} {text} is not in a folder that stays while the run trains; write it into one by "
            f"`rayft squeeze {name} --rank {to} --out DIR`, and go on from DIR/r{to}"
        )
    return find_folder(read_path(text, option))


def ignored_space(config: TrainConfig) -> str:
    """Return a sentence about a search space that a run does not use; empty if there is none."""
    if config.method is None or config.sweep is None:
        return ""
    return "sweep is not used: the run is what method, optim and seed say; `rayft sweep` searches"


def train_run(config: TrainConfig, display: Display, lanes: Ahead | None = None) -> Trained:
    """Train a run, or continue it, track it and score it; return when its lane has ended.

    On KeyboardInterrupt the run saves a checkpoint; then the exception is raised again.

    Args:
        config: the run's.
        display: shows the progress.
        lanes: a lane that has been started for the run.

    Raises:
        RayftError: if a check fails, before anything has started, or if the run fails.
    """
    # Joining an existing cluster costs nothing, and shows which devices it has.
    join()
    if unused := ignored_space(config):
        display.say(unused)
    settings = placed(as_sweep(config, has_gpus()))
    with hold(settings.folder, "--set output=…"):
        plan = checked(settings, display)
        tracker = MlflowTracker(plan.tracker)
        try:
            with room_on(plan.output, others=temporary_folders()):
                trained = _trained(plan, display, tracker, lanes)
        finally:
            tracker.close()
        if left := flush_spool(plan.tracker).pending:
            display.say(
                f"the tracking server does not answer: {left} records are kept in {plan.tracker.spool}; the "
                "same command sends them"
            )
    return trained


def _trained(plan: Plan, display: Display, tracker: MlflowTracker, lanes: Ahead | None) -> Trained:
    """Run the stages that need a cluster."""
    (point,), settings = plan.points, plan.config
    request = TrainRequest(
        key=point.key,
        name=settings.name,
        run=point.run,
        output=str(plan.output),
        evaluate_at=_evaluations(point.run),
        tracker=plan.tracker,
        expected=plan.identity,
    )
    left = earlier(request)
    before = left is not None
    if left is not None:
        display.say(f"{settings.name} is trained already: {left.result.steps} steps, in {plan.output}")
    with executor_for(plan, lanes, 1) as executor:
        check_tracking(plan.tracker)
        with use_lanes(executor, display):
            if left is None:
                with display.stage("train"), display.watch(executor.broker, lambda _: settings.name):
                    left = _train(executor, request)
            scores = _score(plan, executor, left, display)
    run_id = resolve_runs(plan.tracker, [left.run_id])[left.run_id]
    tracker.params(run_id, {"data_digest": plan.parts.digest})
    tracker.metrics(run_id, score_metrics(scores))
    adapter = _adapter(point.run, Path(left.result.folder), plan.output / "adapter")
    return Trained(plan.output, adapter, left.result, scores, run_id, before)


def _evaluations(run: RunConfig) -> tuple[int, ...]:
    """Return the steps after which a run is evaluated besides those of `evaluate.every`."""
    every = -(-run.optim.steps // EVALUATIONS)
    return () if run.evaluate.every else tuple(range(every, run.optim.steps, every))


def _train(executor: Executor, request: TrainRequest) -> TrialResult:
    """Train a run in a lane.

    Raises:
        TrainError: if it fails.
    """
    ((_, outcome),) = executor.run([Job.of(request.key, request)])
    if outcome.result is None:
        raise TrainError(f"{request.name} can't be trained: {outcome.error}")
    return outcome.result


def _score(plan: Plan, executor: Executor, left: TrialResult, display: Display) -> Measured:
    """Score what a run has saved, as a sweep scores its trials. Raw text has no answers to score."""
    if not plan.parts.asks:
        return Measured()
    (point,) = plan.points
    store = ScoreStore(plan.output / "scores", display.say)
    with display.stage("score"), display.watch(executor.broker, lambda _: plan.config.name):
        trials = [Trial(point, left.result, left.run_id)]
        return score_trials(plan, executor, trials, trials, store)[point.name]


def _adapter(run: RunConfig, saved: Path, place: Path) -> Path:
    """Save a run's adapter in the output folder, and return where it is.

    The columns of factors are sorted by singular value, so that it can be used at every lower rank. A whole
    model is not copied.
    """
    kind = method(run.method.name)
    if kind.saves_model:
        return saved
    if kind.exports_lora:
        sort_columns(saved, place, made="train")
        return place
    return load_adapter(saved).save(place)

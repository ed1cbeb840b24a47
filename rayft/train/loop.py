"""`fit`: one run from fresh or given adapters (or its last checkpoint) to an artifact."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta, folder_bytes
from rayft.data.pack import AnyBatch, AnyEncoded, Row, collate_rows, rows_of
from rayft.errors import InterruptedRunError, TrainError
from rayft.evaluate.loss import mean_loss
from rayft.files import room_on, sync_tree
from rayft.identity import Identity
from rayft.models.heads import reset_heads
from rayft.models.inject import Injected, clear, export, inject
from rayft.models.methods import method
from rayft.numerics import derive_seed, seed_everything
from rayft.peft.folder import PeftFolder
from rayft.squeeze.anneal import Phase
from rayft.train import checkpoint
from rayft.train.context import Reporter, Session, Worker
from rayft.train.deepspeed import Engine, build_engine, destroy, gathered, kept, release, set_lr
from rayft.train.graphs import capture_stream, graphed
from rayft.train.memory import PeakMemory
from rayft.train.run import RunConfig
from rayft.train.stages import Stages, stages
from rayft.train.start import read_start
from rayft.train.step import StepResult, optimizer_step

__all__ = ["TrainResult", "current_worker", "fit", "validation_loss"]


@dataclass(frozen=True)
class TrainResult:
    """What came out of a run."""

    finished: bool
    """False if the reporter stopped it early."""
    steps: int
    val_loss: float
    val_curve: list[tuple[int, float]]
    """(step, nats a completion token)."""
    train_curve: list[tuple[int, float]]
    trainable: int
    """Numbers that train at once, at the most: those of an annealed run's first stage."""
    parameters: int
    """Numbers stored in the artifact."""
    rank: int | None
    """Rank of the adapter that was saved; None where what was saved has none."""
    bytes: int
    """Size of the weights on disk."""
    seconds: dict[str, float]
    """Where the time went: train and evaluate, also before the run was resumed; overhead and total since."""
    peak_memory: int
    """Bytes: resident set of the process on a CPU, allocated on the device on a GPU."""
    tokens_per_second: float
    folder: str
    content_hash: str
    start: str = ""
    """Content hash of the adapter that the run started from; empty where it started afresh."""


@dataclass
class _Progress:
    """A run's state between steps; what a checkpoint keeps."""

    step: int = 0
    val_curve: list[tuple[int, float]] = field(default_factory=list)
    train_curve: list[tuple[int, float]] = field(default_factory=list)
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    tokens: int = 0
    start: str = ""
    """Content hash of the adapter that the run started from; empty where it started afresh."""
    saved_at: float = field(default_factory=time.monotonic)
    """When this process last saved or began; not kept."""
    saved_step: int = 0
    """The step that the last checkpoint is of; not kept."""
    saved_seconds: float = 0.0
    """Of training and evaluating, spent by processes before this one; not kept."""

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("saved_")}


@dataclass(frozen=True)
class _Saved:
    """What a run left on disk."""

    folder: Path
    parameters: int
    rank: int | None = None
    bytes: int = 0
    content_hash: str = ""


def fit(
    run: RunConfig,
    session: Session,
    reporter: Reporter,
    folder: Path,
    evaluate_at: Sequence[int] = (),
) -> TrainResult:
    """Train a run (all workers call it together) and save its artifact in `folder`.

    Args:
        run: settled (no `auto` left).
        session: base and data in memory; its adapters are replaced.
        reporter: told of each step, asked at each evaluation whether to go on. A run that is resumed at an
            evaluation asks again: whoever decided then may not have been heard.
        folder: where this node writes what belongs into the run's folder (`Home.place`); a checkpoint that
            the home has of it is resumed.
        evaluate_at: steps after which the search wants a validation loss; the last is always one.

    Raises:
        ConfigError: if a link of a chain would have no steps, or the adapter to start from doesn't fit.
        ArtifactError: if that can't be read, or is another base's, or the folder of the result holds anything
            but an adapter of rayft's.
        TrainError: if a loss is not finite, or a checkpoint doesn't fit.
        InterruptedRunError: if the reporter was interrupted; a checkpoint of the last step was saved.
        DiskFullError: if there is no space for a checkpoint or the result; what was saved before stays.
    """
    started = time.perf_counter()
    worker, model = session.worker, session.loaded.model
    with worker.together():
        # What an earlier lane has left at home, on whichever node that was.
        session.home.bring(folder / "checkpoint")
    parts, start = stages(run, session), read_start(run, session)
    memory = PeakMemory(worker.device)
    injected = inject(model, run.method, run.seed, start.modules)
    reset_heads(model, run.seed, start.heads)
    try:
        with capture_stream() if run.scale.graphs else nullcontext():
            progress, saved, finished = _train_stages(
                run, session, injected, reporter, folder, evaluate_at, parts, start.content_hash
            )
    finally:
        peak = memory.stop()
        if method(run.method.name).shares_base:
            clear(model)
    seconds = time.perf_counter() - started
    return _result(progress, saved, injected.trainable, finished, seconds, peak)


def _train_stages(
    run: RunConfig,
    session: Session,
    injected: Injected,
    reporter: Reporter,
    folder: Path,
    evaluate_at: Sequence[int],
    parts: Stages,
    start: str,
) -> tuple[_Progress, _Saved, bool]:
    """Train stage after stage, each with an engine of its own, and save what came out.

    Gives the progress, what was saved, and whether the run ended.
    """
    model = session.loaded.model
    identity = _identity(run, session, start)
    state = checkpoint.last_state(folder / "checkpoint", identity, session.worker, reporter.note)
    progress = _Progress(start=start)
    for number, stage in enumerate(parts.plan):
        if state is not None and stage.end < state["step"]:
            parts.skip(model, number + 1)
            continue
        engine = build_engine(run, model)
        try:
            if state is not None:
                progress, state = _resume(engine, folder / "checkpoint", state), None
                go_on = _ask_again(progress, reporter, session.worker)
            else:
                parts.enter(engine)
                go_on = True
            with _captured(run, session, progress.step):
                go_on = go_on and _train(run, session, engine, reporter, folder, progress, evaluate_at, stage)
            if not go_on or progress.step >= run.optim.steps:
                break_off = progress.step < run.optim.steps
                return progress, _save(run, session, engine, injected, folder, start), not break_off
            parts.leave(engine, model, number + 1)
        finally:
            destroy(engine)
    raise AssertionError("the last stage ends with the run")


def _result(
    progress: _Progress, saved: _Saved, trainable: int, finished: bool, seconds: float, peak_memory: int
) -> TrainResult:
    spent = progress.train_seconds + progress.evaluate_seconds - progress.saved_seconds
    return TrainResult(
        finished=finished,
        steps=progress.step,
        val_loss=progress.val_curve[-1][1] if progress.val_curve else math.nan,
        val_curve=progress.val_curve,
        train_curve=progress.train_curve,
        trainable=trainable,
        parameters=saved.parameters,
        rank=saved.rank,
        bytes=saved.bytes,
        seconds={
            "train": progress.train_seconds,
            "evaluate": progress.evaluate_seconds,
            "overhead": seconds - spent,
            "total": seconds,
        },
        peak_memory=peak_memory,
        tokens_per_second=progress.tokens / max(progress.train_seconds, 1e-9),
        folder=str(saved.folder),
        content_hash=saved.content_hash,
        start=progress.start,
    )


def validation_loss(session: Session) -> float:
    """Take the mean loss over the validation part (nats a target), shared out over the workers."""
    worker, model = session.worker, session.loaded.model
    model.eval()
    rows = _eval_rows(session.val[worker.rank :: worker.world])
    loss, count = worker.total(*mean_loss(model, _eval_batches(session, rows)))
    # Under ZeRO-3 each forward takes all workers: who has fewer batches runs one more, which does not count.
    for _ in range(worker.largest(len(rows)) - len(rows)):
        mean_loss(model, _eval_batches(session, _eval_rows(session.val[:1])))
    return loss / max(count, 1)


def _eval_rows(encoded: list[AnyEncoded]) -> list[list[Row]]:
    """Share out the rows of examples over batches."""
    rows = rows_of(encoded, max([512, *map(len, encoded)]))
    at_once = 4 if any(example.label is None for example in encoded) else 16
    return [rows[start : start + at_once] for start in range(0, len(rows), at_once)]


def _eval_batches(session: Session, batches: list[list[Row]]) -> Iterator[AnyBatch]:
    for rows in batches:
        session.ticks += 1
        yield collate_rows(rows, session.pad_id).to(session.worker.device)


def _train(
    run: RunConfig,
    session: Session,
    engine: Engine,
    reporter: Reporter,
    folder: Path,
    progress: _Progress,
    evaluate_at: Sequence[int],
    stage: Phase,
) -> bool:
    """Take the steps of a stage; say whether the run may go on."""
    worker, model = session.worker, session.loaded.model
    _recompute_activations(model, run.scale.activation_checkpointing)
    stops = _evaluation_steps(run, evaluate_at)
    while progress.step < stage.end:
        step, started = progress.step, time.perf_counter()
        batches = _micro_batches(run, session, step)
        seed_everything(derive_seed(run.seed, step, worker.rank))
        model.train()
        lr = run.optim.lr_at(step, stage.first, stage.warmup)
        set_lr(engine, lr)
        result = optimizer_step(engine, batches, worker)
        if not math.isfinite(result.loss):
            raise TrainError(
                f"the loss is {result.loss} at step {step + 1} with lr {run.optim.lr:g}; use a lower "
                "learning rate, a longer warm-up, or float32"
            )
        session.ticks += 1
        progress.step = step + 1
        progress.tokens += result.tokens
        seconds = time.perf_counter() - started
        progress.train_seconds += seconds
        progress.train_curve.append((step + 1, result.loss))
        if worker.rank == 0:
            reporter.log(step + 1, _step_metrics(lr, result, seconds))
        if progress.step in stops and not _evaluate(run, session, engine, reporter, folder, progress):
            return False
        if progress.step < run.optim.steps and worker.share(worker.rank == 0 and reporter.interrupted):
            _keep(run, session, engine, folder, progress)
            raise InterruptedRunError(f"interrupted after step {progress.step}", progress.step)
    return True


def _ask_again(progress: _Progress, reporter: Reporter, worker: Worker) -> bool:
    """Report the evaluation of the step that a run is resumed at, if that was one, and return the verdict."""
    if not progress.val_curve or progress.val_curve[-1][0] != progress.step:
        return True
    step, value = progress.val_curve[-1]
    return worker.share(worker.rank == 0 and reporter.report(step, {"val_loss": value}))


def _recompute_activations(model: Any, wanted: bool) -> None:
    """Turn activation checkpointing on or off; the trial before may have had it otherwise."""
    # Before transformers 5.23 both are called by their older names alone.
    if wanted:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        disable = getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)
        disable()


def _micro_batches(run: RunConfig, session: Session, step: int) -> list[AnyBatch]:
    """Give this worker's share of an optimizer step, on its device."""
    worker, schedule = session.worker, session.schedule(run)
    width = run.data.max_length if run.scale.graphs else None
    share = schedule.share(step, worker.rank, worker.world, run.scale.accumulation)
    return [collate_rows(rows, session.pad_id, width).to(worker.device) for rows in share]


@contextmanager
def _captured(run: RunConfig, session: Session, step: int) -> Iterator[None]:
    """Train by CUDA graphs for a while, where the run asks for it."""
    if not run.scale.graphs:
        yield
        return
    session.loaded.model.train()
    with graphed(session.loaded.model, _micro_batches(run, session, step)[0]):
        yield


def _step_metrics(lr: float, result: StepResult, seconds: float) -> dict[str, float]:
    return {
        "train_loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens_per_second": result.tokens / seconds,
        "step_seconds": seconds,
    }


def _evaluate(
    run: RunConfig,
    session: Session,
    engine: Engine,
    reporter: Reporter,
    folder: Path,
    progress: _Progress,
) -> bool:
    """Measure, keep a checkpoint, report; say whether to go on."""
    worker, started = session.worker, time.perf_counter()
    value = validation_loss(session)
    release(engine)
    if not math.isfinite(value):
        raise TrainError(
            f"the validation loss is {value} after step {progress.step} with lr {run.optim.lr:g}; use a "
            "lower learning rate, a longer warm-up, or float32"
        )
    progress.val_curve.append((progress.step, value))
    progress.evaluate_seconds += time.perf_counter() - started
    # Before the checkpoint, from which a run that fails here continues behind this step.
    if run.evaluate.trail and not method(run.method.name).saves_model:
        trail = folder / "trail" / f"step-{progress.step:06d}"
        _save_adapter(run, session, engine, trail, progress.start)
        with worker.together():
            session.home.send(trail)
    # Before the report: while the search decides, the run is safe.
    if progress.step < run.optim.steps and _due(run, progress, worker):
        _keep(run, session, engine, folder, progress)
    go_on = True
    if worker.rank == 0:
        go_on = reporter.report(progress.step, {"val_loss": value})
    return worker.share(go_on)


def _keep(run: RunConfig, session: Session, engine: Engine, folder: Path, progress: _Progress) -> None:
    """Save a checkpoint, unless there is one of this step."""
    if progress.saved_step == progress.step:
        return
    identity = _identity(run, session, progress.start)
    checkpoint.save(folder / "checkpoint", engine, identity, session.worker, session.home, progress.state())
    progress.saved_at, progress.saved_step = time.monotonic(), progress.step


def _due(run: RunConfig, progress: _Progress, worker: Worker) -> bool:
    """Decide, for all workers alike, whether the last checkpoint is old enough for another."""
    return worker.share(time.monotonic() - progress.saved_at >= run.evaluate.checkpoint_seconds)


def _evaluation_steps(run: RunConfig, evaluate_at: Sequence[int]) -> set[int]:
    every = run.evaluate.every
    regular = range(every, run.optim.steps, every) if every else ()
    return {step for step in (*evaluate_at, *regular) if step < run.optim.steps} | {run.optim.steps}


def _resume(engine: Engine, folder: Path, state: Mapping[str, Any]) -> _Progress:
    checkpoint.restore(folder, engine, state)
    values = {name: state[name] for name in _Progress().state()}
    for curve in ("val_curve", "train_curve"):
        values[curve] = [(int(step), float(value)) for step, value in values[curve]]
    spent = values["train_seconds"] + values["evaluate_seconds"]
    return _Progress(**values, saved_step=values["step"], saved_seconds=spent)


def _save(
    run: RunConfig, session: Session, engine: Engine, injected: Injected, folder: Path, parent: str
) -> _Saved:
    """Save what was trained: an adapter folder, or a model folder for a full fine-tune."""
    model, worker = session.loaded.model, session.worker
    whole = method(run.method.name).saves_model
    saved = _Saved(folder / ("model" if whole else "adapter"), injected.trainable)
    if not whole:
        artifact = _save_adapter(run, session, engine, saved.folder, parent)
        if artifact is None:
            return saved
        return replace(
            saved,
            parameters=artifact.parameters,
            rank=artifact.rank if isinstance(artifact, AdapterArtifact) else None,
            bytes=folder_bytes(saved.folder),
            content_hash=artifact.content_hash,
        )
    with worker.together(), gathered(engine, model.parameters()):
        if worker.rank > 0:
            return saved
        _save_model(session, saved.folder)
        size = sum(file.stat().st_size for file in saved.folder.glob("*.safetensors"))
        return replace(saved, bytes=size)


def _save_model(session: Session, folder: Path) -> None:
    """Write a whole model as a folder that transformers loads; where there is no space, nothing is left."""
    model = session.loaded.model
    with room_on(folder, sum(parameter.nbytes for parameter in model.parameters())):
        try:
            model.save_pretrained(folder)
            session.loaded.tokenizer.save_pretrained(folder)
            sync_tree(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _save_adapter(
    run: RunConfig, session: Session, engine: Engine, folder: Path, parent: str
) -> AdapterArtifact | PeftFolder | None:
    """Write what the adapters are now: rank 0; all take part, since ZeRO-3 partitions frozen factors too."""
    model = session.loaded.model
    with session.worker.together(), gathered(engine, kept(model).values()):
        if session.worker.rank > 0:
            return None
        artifact = export(model, _meta(run, session, parent))
        artifact.save(folder)
        return artifact


def _meta(run: RunConfig, session: Session, parent: str) -> ArtifactMeta:
    return ArtifactMeta(
        method=run.method.name,
        task=run.model.task,
        base_model=run.model.name,
        base_fingerprint=session.loaded.fingerprint,
        data_digest=session.parts.digest,
        parent=parent,
    )


def _identity(run: RunConfig, session: Session, start: str) -> Identity:
    known = {"config": run.hash, "start": start, "start_name": run.start or ""}
    return session.identity.model_copy(update=known)


def current_worker(run: RunConfig) -> Worker:
    """Place this process among the workers of a run and give it its threads."""
    torch.set_num_threads(run.scale.threads or 1)
    device = f"cuda:{torch.cuda.current_device()}" if run.scale.device == "cuda" else "cpu"
    return Worker.current(device)

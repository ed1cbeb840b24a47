"""`fit`: one run from fresh adapters (or its last checkpoint) to an artifact."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rayft.artifacts import ArtifactMeta, folder_bytes
from rayft.data.pack import Batch, ClassBatch, PackedRow, collate, collate_classification, pack
from rayft.data.template import Encoded
from rayft.errors import TrainError
from rayft.evaluate.loss import mean_loss
from rayft.methods import method
from rayft.models.inject import Injected, clear, export, inject, reset_heads
from rayft.numerics import derive_seed, seed_everything
from rayft.train import checkpoint
from rayft.train.context import Reporter, Session, Worker
from rayft.train.deepspeed import Engine, build_engine, destroy, gathered, set_lr
from rayft.train.memory import PeakMemory
from rayft.train.run import RunConfig
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
    parameters: int
    """Numbers stored in the artifact."""
    bytes: int
    """Size of the weights on disk."""
    seconds: dict[str, float]
    """Where the time went: train, evaluate, overhead, total."""
    peak_memory: int
    """Bytes: resident set of the process on a CPU, allocated on the device on a GPU."""
    tokens_per_second: float
    folder: str
    content_hash: str


@dataclass
class _Progress:
    """A run's state between steps; what a checkpoint keeps."""

    step: int = 0
    val_curve: list[tuple[int, float]] = field(default_factory=list)
    train_curve: list[tuple[int, float]] = field(default_factory=list)
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    tokens: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    """When this process last saved or began; not kept."""

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "saved_at"}


@dataclass(frozen=True)
class _Saved:
    """What a run left on disk."""

    folder: Path
    parameters: int
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
        reporter: told of each step, asked at each evaluation whether to go on.
        folder: the run's own; a checkpoint in it is resumed.
        evaluate_at: steps after which the search wants a validation loss; the last is always one.

    Raises:
        TrainError: if the loss is not finite, or a checkpoint doesn't fit.
    """
    started = time.perf_counter()
    worker, model = session.worker, session.loaded.model
    memory = PeakMemory(worker.device)
    # Heads first: an adapter draws from generators of its own, so the order changes nothing.
    reset_heads(model, run.seed)
    injected = inject(model, run.method, run.seed)
    engine = build_engine(run, model)
    try:
        progress = _resume(run, engine, folder / "checkpoint")
        finished = _train(run, session, engine, reporter, folder, progress, evaluate_at)
        saved = _save(run, session, injected, folder)
    finally:
        destroy(engine)
        if method(run.method.name).shares_base:
            clear(model)
    seconds = time.perf_counter() - started
    return _result(progress, saved, injected.trainable, finished, seconds, memory.stop())


def _result(
    progress: _Progress, saved: _Saved, trainable: int, finished: bool, seconds: float, peak_memory: int
) -> TrainResult:
    spent = progress.train_seconds + progress.evaluate_seconds
    return TrainResult(
        finished=finished,
        steps=progress.step,
        val_loss=progress.val_curve[-1][1] if progress.val_curve else math.nan,
        val_curve=progress.val_curve,
        train_curve=progress.train_curve,
        trainable=trainable,
        parameters=saved.parameters,
        bytes=saved.bytes,
        seconds={
            "train": progress.train_seconds,
            "evaluate": progress.evaluate_seconds,
            "overhead": max(0.0, seconds - spent),
            "total": seconds,
        },
        peak_memory=peak_memory,
        tokens_per_second=progress.tokens / max(progress.train_seconds, 1e-9),
        folder=str(saved.folder),
        content_hash=saved.content_hash,
    )


def validation_loss(session: Session) -> float:
    """Take the mean loss over the validation part (nats a target), shared out over the workers."""
    worker, model = session.worker, session.loaded.model
    model.eval()
    mine = session.val[worker.rank :: worker.world]
    batches = _eval_batches(session, mine)
    loss, count = worker.total(*mean_loss(model, (batch.to(worker.device) for batch in batches)))
    return loss / max(count, 1)


def _eval_batches(session: Session, encoded: list[Encoded]) -> list[Batch | ClassBatch]:
    if not encoded:
        return []
    if encoded[0].label is not None:
        rows, at_once = [PackedRow((example,)) for example in encoded], 16
    else:
        rows, at_once = pack(encoded, max(512, max(map(len, encoded)))), 4
    return [_collate(session, rows[start : start + at_once]) for start in range(0, len(rows), at_once)]


def _train(
    run: RunConfig,
    session: Session,
    engine: Engine,
    reporter: Reporter,
    folder: Path,
    progress: _Progress,
    evaluate_at: Sequence[int],
) -> bool:
    worker, model = session.worker, session.loaded.model
    if run.scale.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    stops = _evaluation_steps(run, evaluate_at)
    schedule = session.schedule(run)
    while progress.step < run.optim.steps:
        step, started = progress.step, time.perf_counter()
        micro = schedule.share(step, worker.rank, worker.world, run.scale.accumulation)
        batches = [_collate(session, rows).to(worker.device) for rows in micro]
        seed_everything(derive_seed(run.seed, step, worker.rank))
        model.train()
        set_lr(engine, run.optim.lr_at(step))
        result = optimizer_step(engine, batches, worker)
        if not math.isfinite(result.loss):
            raise TrainError(
                f"the loss is {result.loss} at step {step + 1} with lr {run.optim.lr:g}; use a lower "
                "learning rate, a longer warm-up, or float32"
            )
        progress.step = step + 1
        progress.tokens += result.tokens
        seconds = time.perf_counter() - started
        progress.train_seconds += seconds
        progress.train_curve.append((step + 1, result.loss))
        if worker.rank == 0:
            reporter.log(step + 1, _step_metrics(run, step, result, seconds))
        if progress.step in stops and not _evaluate(run, session, engine, reporter, folder, progress):
            return progress.step >= run.optim.steps
    return True


def _step_metrics(run: RunConfig, step: int, result: StepResult, seconds: float) -> dict[str, float]:
    return {
        "train_loss": result.loss,
        "lr": run.optim.lr_at(step),
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
    progress.val_curve.append((progress.step, value))
    progress.evaluate_seconds += time.perf_counter() - started
    # Before the report: while the search decides, the run is safe.
    if progress.step < run.optim.steps and _due(run, progress, worker):
        checkpoint.save(folder / "checkpoint", engine, run, worker, progress.state())
        progress.saved_at = time.monotonic()
    go_on = True
    if worker.rank == 0:
        go_on = reporter.report(progress.step, {"val_loss": value})
    return worker.share(go_on)


def _due(run: RunConfig, progress: _Progress, worker: Worker) -> bool:
    """Decide, for all workers alike, whether the last checkpoint is old enough for another."""
    return worker.share(time.monotonic() - progress.saved_at >= run.evaluate.checkpoint_seconds)


def _evaluation_steps(run: RunConfig, evaluate_at: Sequence[int]) -> set[int]:
    every = run.evaluate.every
    regular = range(every, run.optim.steps, every) if every else ()
    return {step for step in (*evaluate_at, *regular) if step < run.optim.steps} | {run.optim.steps}


def _resume(run: RunConfig, engine: Engine, folder: Path) -> _Progress:
    state = checkpoint.last_state(folder, run)
    if state is None:
        return _Progress()
    checkpoint.restore(folder, engine, state)
    kept = {name: state[name] for name in _Progress().state()}
    for curve in ("val_curve", "train_curve"):
        kept[curve] = [(int(step), float(value)) for step, value in kept[curve]]
    return _Progress(**kept)


def _collate(session: Session, rows: Sequence[PackedRow]) -> Batch | ClassBatch:
    labelled = rows[0].examples[0].label is not None
    return (collate_classification if labelled else collate)(rows, session.pad_id)


def _save(run: RunConfig, session: Session, injected: Injected, folder: Path) -> _Saved:
    """Save what was trained: an adapter folder, or a model folder for a full fine-tune."""
    model, worker = session.loaded.model, session.worker
    lora = method(run.method.name).exports_lora
    saved = _Saved(folder / ("adapter" if lora else "model"), injected.trainable)
    trained = [p for p in model.parameters() if p.requires_grad or not lora]
    with gathered(run, trained):
        if worker.rank > 0:
            return saved
        if lora:
            artifact = export(model, _meta(run, session))
            artifact.save(saved.folder)
            return replace(
                saved,
                parameters=artifact.parameters,
                bytes=folder_bytes(saved.folder),
                content_hash=artifact.content_hash,
            )
        model.save_pretrained(saved.folder)
        session.loaded.tokenizer.save_pretrained(saved.folder)
        size = sum(file.stat().st_size for file in saved.folder.glob("*.safetensors"))
        return replace(saved, bytes=size)


def _meta(run: RunConfig, session: Session) -> ArtifactMeta:
    return ArtifactMeta(
        method=run.method.name,
        task=run.model.task,
        base_model=run.model.name,
        base_fingerprint=session.loaded.fingerprint,
        data_digest=session.parts.digest,
    )


def current_worker(run: RunConfig) -> Worker:
    """Place this process among the workers of a run and give it its threads."""
    torch.set_num_threads(run.scale.threads or 1)
    device = f"cuda:{torch.cuda.current_device()}" if run.scale.device == "cuda" else "cpu"
    return Worker.current(device)

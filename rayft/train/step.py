"""One optimizer step: micro-batches through the engine, one gradient, one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayft.data.pack import AnyBatch, ClassBatch
from rayft.evaluate.loss import batch_loss
from rayft.train.context import Worker
from rayft.train.deepspeed import Engine, grad_norm

__all__ = ["StepResult", "optimizer_step"]


@dataclass(frozen=True)
class StepResult:
    """What a step saw: mean loss (nats a completion token), gradient norm before clipping, tokens."""

    loss: float
    grad_norm: float
    tokens: int


def optimizer_step(engine: Engine, batches: Sequence[AnyBatch], worker: Worker) -> StepResult:
    """Run forward, backward and update over this worker's micro-batches.

    The gradient is that of (sum of losses) / (number of targets) over all micro-batches of all
    workers, whatever their share of the targets.
    """
    targets = sum(_targets(batch) for batch in batches)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    targets, tokens = (int(v) for v in worker.total(targets, tokens))
    total = 0.0
    for batch in batches:
        loss, _ = batch_loss(engine.module, batch, engine)
        total += float(loss.detach())
        engine.backward(loss * (worker.world * len(batches) / targets))
        norm = grad_norm(engine) if engine.zero_optimization_stage() == 0 else None
        engine.step()
    (total,) = worker.total(total)
    return StepResult(total / targets, grad_norm(engine) if norm is None else norm, tokens)


def _targets(batch: AnyBatch) -> int:
    return len(batch.labels if isinstance(batch, ClassBatch) else batch.targets)

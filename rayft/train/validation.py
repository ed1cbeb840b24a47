"""The loss on the validation part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rayft.data.pack import AnyBatch, Rows, collate_rows, rows_of
from rayft.data.texts import lengths_of
from rayft.evaluate.loss import mean_loss
from rayft.train.session import Session

__all__ = ["MOST_TOKENS", "longest", "rows_at_once", "validation_loss", "validation_rows"]

MOST_TOKENS = 2**15
"""Most tokens in a batch, unless a single row has more."""


def validation_loss(session: Session) -> float:
    """Return the mean loss over the validation part (nats per target); the workers share the examples.

    Raises:
        torch.OutOfMemoryError: if not even one row at a time fits into the device's memory; or if a batch
            does not and ZeRO-3 has partitioned the base, since other workers may wait for this one.
    """
    worker, model = session.worker, session.loaded.model
    model.eval()
    rows = validation_rows(session, range(worker.rank, len(session.val), worker.world))
    loss, count = worker.total(*_summed(session, rows))
    # Under ZeRO-3 all workers must take part in each forward pass: those with fewer batches run additional
    # ones, which don't count.
    batches = -(-len(rows) // rows_at_once(session))
    for _ in range(worker.largest(batches) - batches):
        mean_loss(model, _eval_batches(session, validation_rows(session, range(1)), 1))
    return loss / max(count, 1)


def longest(session: Session) -> int:
    """Return the tokens of the longest validation example."""
    return int(lengths_of(session.val).max())


def validation_rows(session: Session, chosen: Sequence[int]) -> Rows:
    """Pack some validation examples into rows."""
    length = max(512, longest(session))
    return rows_of(session.val, length, packing=session.packing, order=chosen)


def rows_at_once(session: Session) -> int:
    """Return the number of rows in a batch of the validation: one, if rows are long."""
    rows = 4 if session.val[0].label is None else 16
    return max(1, min(rows, MOST_TOKENS // longest(session)))


def _summed(session: Session, rows: Rows) -> tuple[float, int]:
    """Return what `mean_loss` does of some rows; fewer share a batch if they do not fit."""
    model, at_once = session.loaded.model, max(1, min(len(rows), rows_at_once(session)))
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    while True:
        try:
            return mean_loss(model, _eval_batches(session, rows, at_once))
        except torch.OutOfMemoryError:
            if at_once == 1 or partitioned:
                raise
        at_once = -(-at_once // 2)


def _eval_batches(session: Session, rows: Rows, at_once: int) -> Iterator[AnyBatch]:
    for start in range(0, len(rows), at_once):
        session.tick()
        batch = rows[start : start + at_once]
        yield collate_rows(batch, session.pad_id).to(session.worker.device)

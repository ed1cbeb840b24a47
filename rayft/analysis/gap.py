"""The measured generalisation gap: held-out minus training loss, on samples of equal size.

An example's loss is the mean over its targets, in nats, cut off at `clip`. The samples are drawn from the
whole training part and from the test part, which no choice was made on. The interval is a percentile
bootstrap over examples, the two samples resampled independently (Efron & Tibshirani 1993, ch. 8 and 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from rayft.analysis.record import Gap
from rayft.data.pack import AnyEncoded, Batch, collate_rows, rows_of
from rayft.data.texts import gather
from rayft.errors import ReportError
from rayft.evaluate.loss import target_losses
from rayft.numerics import derive_seed, generator

__all__ = ["example_losses", "gap", "sample"]

RESAMPLES = 10_000
ItemT = TypeVar("ItemT")


def sample(examples: Sequence[ItemT], count: int, *seed: object) -> list[ItemT]:
    """Draw examples without replacement; the same seed draws the same ones."""
    chosen = torch.randperm(len(examples), generator=generator(*seed))[:count].tolist()
    return gather(examples, chosen)


@torch.inference_mode()
def example_losses(
    model: nn.Module, examples: Sequence[AnyEncoded], pad_id: int, device: str, rows: int = 16
) -> list[float]:
    """Return the mean loss of each example's targets (nats), in order.

    Args:
        model: with the adapter in it.
        examples: encoded, of one kind.
        pad_id: what short rows are padded with.
        device: the model's.
        rows: how many examples a batch has, each in a row of its own.
    """
    found: list[float] = []
    each = rows_of(examples, 0, packing=False)
    for start in range(0, len(each), rows):
        part = each[start : start + rows]
        batch = collate_rows(part, pad_id).to(device)
        losses = target_losses(model, batch).double()
        if isinstance(batch, Batch):
            owner = batch.completion_index // batch.input_ids.shape[1]
        else:
            owner = torch.arange(len(part), device=losses.device)
        sums = losses.new_zeros(len(part)).index_add_(0, owner, losses)
        counts = torch.bincount(owner, minlength=len(part)).clamp(min=1)
        found += (sums / counts).tolist()
    return found


def gap(train: Sequence[float], held_out: Sequence[float], clip: float, seed: int = 0) -> Gap:
    """Compare the losses of equal numbers of training and held-out examples.

    Args:
        train: losses of training examples.
        held_out: losses of examples that nothing was chosen on.
        clip: larger losses, and NaN, count as this much.
        seed: of the bootstrap.

    Raises:
        ReportError: if the samples differ in size or have fewer than two examples.
    """
    if len(train) != len(held_out) or len(train) < 2:
        raise ReportError(
            f"{len(train)} training and {len(held_out)} held-out examples; a gap needs equal numbers "
            "of both, two or more"
        )
    first, second = (
        np.nan_to_num(np.asarray(values, dtype=float), nan=clip, posinf=clip).clip(max=clip)
        for values in (train, held_out)
    )
    rng, n = np.random.default_rng(derive_seed("gap", seed)), len(first)
    means = [values[rng.integers(0, n, (RESAMPLES, n))].mean(1) for values in (first, second)]
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    return Gap(
        train=float(first.mean()), held_out=float(second.mean()), low=float(low), high=float(high), n=n
    )

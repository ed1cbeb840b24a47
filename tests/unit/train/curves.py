"""Compare the loss curves of two runs."""

from __future__ import annotations

import torch

from rayft.numerics import assert_close
from rayft.train.trainer import TrainResult

WIDEST = 64
"""Number of terms of the longest sum in the tiny model, which is in its MLP."""


def assert_same_losses(one: TrainResult, other: TrainResult) -> None:
    """Assert that the losses of two float32 runs differ only by the rounding of their steps."""
    assert [step for step, _ in one.train_curve] == [step for step, _ in other.train_curve]
    expected, actual = (torch.tensor([loss for _, loss in run.train_curve]) for run in (one, other))
    assert_close(actual, expected, torch.float32, WIDEST, depth=len(one.train_curve))

"""When two loss curves are the same run's."""

from __future__ import annotations

import torch

from rayft.numerics import assert_close
from rayft.train.trainer import TrainResult

WIDEST = 64
"""Terms of the longest sum in the tiny model, in its MLP."""


def assert_same_losses(one: TrainResult, other: TrainResult) -> None:
    """Assert that two float32 runs saw the same losses but for rounding, once in each step."""
    assert [step for step, _ in one.train_curve] == [step for step, _ in other.train_curve]
    expected, actual = (torch.tensor([loss for _, loss in run.train_curve]) for run in (one, other))
    assert_close(actual, expected, torch.float32, WIDEST, depth=len(one.train_curve))

"""A trial whose second worker has little memory, for tests of worker groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rayft.sweep.request import TrainRequest
from rayft.train import trainer

STEP = 4
"""The step, counted from 0, from which on the memory is short."""


@dataclass(frozen=True)
class ShortOfMemory(TrainRequest):
    """A trial whose second worker has room for some rows at a time from a step on; the first one waits."""

    room: int = 1

    def __call__(self, lane: Any) -> Any:
        """Train."""
        taken = trainer.optimizer_step

        def optimizer_step(engine: Any, batches: Any, *more: Any) -> Any:
            if more[0].rank == 1 and engine.global_steps >= STEP and len(batches[0].input_ids) > self.room:
                raise torch.OutOfMemoryError("no room")
            return taken(engine, batches, *more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "optimizer_step", optimizer_step)
            return super().__call__(lane)

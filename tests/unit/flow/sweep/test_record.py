from __future__ import annotations

from typing import Any

import pytest

from rayft.data.section import DataConfig
from rayft.flow.scoring import Measured
from rayft.flow.sweep.record import _trial
from rayft.methods.base import MethodConfig
from rayft.squeeze.anneal import AnnealConfig
from rayft.sweep.space import Point
from rayft.sweep.tuner import Trial
from rayft.train.run import OptimConfig, RunConfig

RESULT: dict[str, Any] = {
    "steps": 3,
    "rank": 16,
    "val_curve": [(3, 1.0)],
    "train_curve": [(1, 2.0)],
    "trainable": 10,
    "bytes": 20,
    "seconds": {"train": 1.0, "evaluate": 0.5, "overhead": 0.1},
    "peak_memory": 30,
    "folder": "adapter",
}


@pytest.mark.parametrize(("finished", "rank"), [(True, 8), (False, 16)])
def test_an_annealed_trial_that_was_stopped_has_the_rank_it_had(finished: bool, rank: int) -> None:
    run = RunConfig(
        data=DataConfig(source="jsonl", name="rows.jsonl"),
        method=MethodConfig(rank=32),
        anneal=AnnealConfig(rank=8),
        optim=OptimConfig(steps=60),
    )
    point = Point(key="lora-r32to8-1", name="lora-r32to8", run=run)
    trial = Trial(point=point, result={**RESULT, "finished": finished})
    assert _trial(trial, Measured()).rank == rank

"""What the search is told of a trial."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rayft.data.section import DataConfig
from rayft.squeeze.anneal import AnnealConfig
from rayft.sweep import search
from rayft.sweep.request import TrainRequest
from rayft.sweep.search import TrialActor
from rayft.train.run import EvaluateConfig, RunConfig
from rayft.train.trainer import TrainResult

CURVE = [(2, 3.0), (4, 1.0), (6, 2.0), (8, 4.0)]


@pytest.mark.parametrize(
    ("keep", "rank", "kept", "losses"),
    [
        ("best", None, 1.0, [3.0, 1.0, 1.0, 1.0]),
        ("last", None, 4.0, [3.0, 1.0, 2.0, 4.0]),
        # Of an annealed trial, what was found at a higher rank is not kept.
        ("best", 4, 2.0, [3.0, 1.0, 2.0, 2.0]),
    ],
)
def test_a_trial_is_judged_by_the_weights_that_it_keeps(
    monkeypatch: pytest.MonkeyPatch, keep: Any, rank: int | None, kept: float, losses: list[float]
) -> None:
    result = TrainResult(True, 8, kept, CURVE)
    monkeypatch.setattr(search, "earlier", lambda _: SimpleNamespace(result=result))
    run = RunConfig(
        data=DataConfig(source="jsonl", name="rows.jsonl"),
        anneal=AnnealConfig(rank=rank) if rank else None,
        evaluate=EvaluateConfig(keep=keep),
    )
    request = TrainRequest("t", "t", run, "out", (2, 4, 6))
    actor = TrialActor.__new__(TrialActor)
    actor.setup({"request": request}, executor=SimpleNamespace())  # type: ignore[arg-type]
    for _ in range(2):
        assert [actor.step()["val_loss"] for _ in CURVE] == losses
        # The next trial in the same process begins anew.
        actor.reset_config({"request": request})

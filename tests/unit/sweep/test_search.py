"""What the search is told of a trial."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from rayft.data.section import DataConfig
from rayft.squeeze.anneal import AnnealConfig
from rayft.sweep import search, trial_actor
from rayft.sweep.executor import MOST_SLOTS, LaneExecutor
from rayft.sweep.jobs import Event
from rayft.sweep.request import TrainRequest
from rayft.sweep.space import MethodSpace, SweepConfig, points
from rayft.sweep.trial_actor import TrialActor
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig
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
    actor, config = TrialActor.__new__(TrialActor), {"trial": search._start(request)}
    actor.setup(config, entrance=SimpleNamespace())  # type: ignore[arg-type]
    for _ in range(2):
        assert [actor.step()["val_loss"] for _ in CURVE] == losses
        # The next trial in the same process begins anew.
        actor.reset_config(config)


def test_a_process_that_takes_the_place_of_another_knows_what_was_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    curve: list[tuple[int, float]] = []
    monkeypatch.setattr(trial_actor, "last_curve", lambda _: curve)
    request = TrainRequest("t", "t", RunConfig(data=DataConfig(source="jsonl", name="rows.jsonl")), "out", ())
    config = {"trial": search._start(request)}
    # The trial has saved a checkpoint since Tune was told of it.
    curve += [(2, 3.0), (4, 1.0)]
    actor = TrialActor.__new__(TrialActor)
    actor.setup(config, entrance=SimpleNamespace(submit=lambda *_, **__: None))  # type: ignore[arg-type]
    assert [actor.step()["val_loss"] for _ in curve] == [3.0, 1.0]
    monkeypatch.setattr(trial_actor.ray, "get", lambda _: Event("report", 6, {"val_loss": 2.0}))
    actor._entrance = SimpleNamespace(broker=MagicMock())  # type: ignore[assignment]
    assert actor.step()["val_loss"] == 1.0


@pytest.mark.parametrize(
    ("method", "slots", "expected", "submitted"),
    [
        # As many as lanes x slots, of trials that share steps.
        ("lora", None, 2 * MOST_SLOTS, 3),
        ("lora", 3, 6, 3),
        ("lora", 1, 2, 0),
        # Nothing is gained by more than there are lanes.
        ("paca", None, 2, 0),
        ("paca", 3, 2, 0),
    ],
)
def test_as_many_trials_are_begun_as_lanes_can_use(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    slots: int | None,
    expected: int,
    submitted: int,
) -> None:
    executor = LaneExecutor.__new__(LaneExecutor)
    executor.lanes, executor.slots, executor._started = 2, slots, True
    jobs, begun = list[Any](), list[int]()
    monkeypatch.setattr(LaneExecutor, "submit", lambda _, found: jobs.extend(found))
    monkeypatch.setattr(LaneExecutor, "forget", lambda *_: None)
    monkeypatch.setattr(search, "_tuner", lambda *given: SimpleNamespace(fit=lambda: begun.append(given[-1])))
    monkeypatch.setattr(search, "_collect", lambda *_: None)
    space = {method: MethodSpace(ranks=(2, 4, 8), lr=(1e-3,))}
    sweep = SweepConfig(methods=space, grace=2)
    run = RunConfig(
        data=DataConfig(source="jsonl", name="rows.jsonl"), optim=OptimConfig(steps=8, rows_per_step=4)
    )
    search.search(sweep, points(sweep, run), executor, tmp_path)
    assert begun == [expected]
    assert len(jobs) == submitted


def test_trials_that_take_turns_leave_the_slots_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = LaneExecutor.__new__(LaneExecutor)
    executor.lanes, executor.slots, executor._started = 1, 2, True
    jobs, begun = list[Any](), list[str]()
    monkeypatch.setattr(LaneExecutor, "submit", lambda _, found: jobs.extend(found))
    monkeypatch.setattr(LaneExecutor, "forget", lambda *_: None)

    def tuner(_: Any, requests: Any, *rest: Any) -> Any:
        begun.extend(request.run.method.name for request in requests)
        return MagicMock()

    monkeypatch.setattr(search, "_tuner", tuner)
    monkeypatch.setattr(search, "_collect", lambda point, request, *_: (point.key, request.key))
    space = {name: MethodSpace(lr=(1e-3, 2e-3)) for name in ("full", "lora", "paca")}
    sweep = SweepConfig(methods=space, grace=2)
    trials = points(sweep, RunConfig(data=DataConfig(source="jsonl", name="rows.jsonl")))
    found: Any = search.search(sweep, trials, executor, tmp_path)
    assert begun == ["lora", "lora", "full", "paca", "full", "paca"]
    assert len(jobs) == 2, "both slots have a trial"
    assert found == [(trial.key, trial.key) for trial in trials]


def test_the_process_of_a_trial_imports_no_torch() -> None:
    script = "import sys, rayft.sweep.trial_actor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "mlflow"} & {*done.stdout.split()}

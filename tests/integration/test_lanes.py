"""Lanes and isolated trials with real Ray Train worker groups over gloo."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from rayft.artifacts import AdapterArtifact
from rayft.data.source import DataConfig
from rayft.methods.base import ChainConfig
from rayft.models.load import ModelConfig
from rayft.numerics import tolerance
from rayft.sweep.executor import EXECUTORS, Executor
from rayft.sweep.space import MethodSpace, SweepConfig, points
from rayft.sweep.tuner import Trial, search
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def make_run(folder: Path, *, steps: int = 8, **scale: Any) -> RunConfig:
    settings = {"device": "cpu", "dtype": "float32", "zero": 0, "threads": 1, **scale}
    return RunConfig(
        model=ModelConfig(name=str(folder)),
        data=DataConfig(
            name="needle_haystack",
            params={"min_num_statements": 1, "max_num_statements": 2},
            train=48,
            val=8,
            test=8,
            max_length=512,
        ),
        optim=OptimConfig(steps=steps, rows_per_step=2),
        scale=ScaleConfig(**settings),
        evaluate=EvaluateConfig(checkpoint_seconds=0),
    )


def go(
    kind: str,
    run: RunConfig,
    space: Mapping[str, MethodSpace],
    output: Path,
    during: Any = None,
    *,
    grace: int = 2,
) -> list[Trial]:
    sweep = SweepConfig(methods=dict(space), grace=grace, executor=kind)  # type: ignore[arg-type]
    executor = EXECUTORS[kind](run.scale, str(output / "ray"), 1, 3, f"t{time.time_ns()}")
    executor.start()
    helper = threading.Thread(target=during, args=(executor,)) if during else None
    if helper:
        helper.start()
    try:
        return search(sweep, points(sweep, run), executor, output)
    finally:
        if helper:
            helper.join()
        executor.close()


def result(trial: Trial) -> dict[str, Any]:
    assert trial.result is not None, trial.error
    return trial.result


LORA = {"lora": MethodSpace(ranks=(4,), lr=(1e-2, 1e-4))}


@pytest.fixture(scope="module")
def in_a_lane(local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    return go("lane", make_run(tiny_folder), LORA, tmp_path_factory.mktemp("lane"))


def test_asha_stops_the_worse_trial_and_keeps_its_adapter(in_a_lane: list[Trial]) -> None:
    good, bad = in_a_lane
    assert (good.status, bad.status) == ("finished", "stopped")
    assert result(bad)["steps"] == 2
    assert AdapterArtifact.load(result(bad)["folder"]).content_hash == result(bad)["content_hash"]


def test_a_lane_trains_as_an_isolated_worker_group_does(
    in_a_lane: list[Trial], tiny_folder: Path, tmp_path: Path
) -> None:
    (alone,) = go("isolated", make_run(tiny_folder), {"lora": MethodSpace(ranks=(4,), lr=(1e-4,))}, tmp_path)
    shared = result(in_a_lane[1])
    steps = shared["steps"]
    # The lane's trial is its second: what the first one left behind would show here.
    assert result(alone)["train_curve"][:steps] == shared["train_curve"]
    assert result(alone)["val_curve"][: len(shared["val_curve"])] == [
        list(pair) for pair in shared["val_curve"]
    ]


def test_a_lane_that_dies_comes_back_and_its_trial_goes_on(
    in_a_lane: list[Trial], tiny_folder: Path, tmp_path: Path
) -> None:
    run = make_run(tiny_folder, steps=40)
    run = run.model_copy(update={"evaluate": EvaluateConfig(checkpoint_seconds=0, every=4)})
    killed: list[int] = []

    def kill(executor: Executor) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not killed:
            (job,) = ray.get(executor.broker.snapshot.remote()) or ({},)
            if job.get("step", 0) >= 8:
                for pid in job["pids"]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.01)

    (trial,) = go("lane", run, {"lora": MethodSpace(ranks=(4,), lr=(1e-2,))}, tmp_path / "killed", kill)
    assert killed, "the worker ended before it could be killed"
    assert trial.status == "finished"
    (whole,) = go("lane", run, {"lora": MethodSpace(ranks=(4,), lr=(1e-2,))}, tmp_path / "whole")
    assert result(trial)["content_hash"] == result(whole)["content_hash"]
    assert result(trial)["train_curve"] == result(whole)["train_curve"]
    assert result(trial)["seconds"]["total"] < result(whole)["seconds"]["total"] + 60


STEPS = 4
FAMILIES = {
    **{name: MethodSpace(ranks=(4,)) for name in ("lora_plus", "asym", "cla", "paca")},
    **{name: MethodSpace(ranks=(4,), chain=ChainConfig(links=2)) for name in ("rac", "rc3la")},
}


@pytest.fixture(scope="module")
def on_one_worker(
    local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trial]:
    run = make_run(tiny_folder, steps=STEPS)
    trials = go("lane", run, FAMILIES, tmp_path_factory.mktemp("one"), grace=STEPS)
    return {trial.point.run.method.name: trial for trial in trials}


# Alone under ZeRO-3: a chain, whose frozen A's are partitioned too, and an engine for each link.
@pytest.mark.parametrize(("zero", "names"), [(0, tuple(FAMILIES)), (3, ("rac",))])
def test_two_workers_train_as_one(
    on_one_worker: dict[str, Trial], tiny_folder: Path, tmp_path: Path, zero: int, names: tuple[str, ...]
) -> None:
    kind = "isolated" if zero == 3 else "lane"
    run = make_run(tiny_folder, steps=STEPS, workers=2, zero=zero)
    # Rounding of the forward and backward of each step through 2 layers of 64-term sums.
    allowed = tolerance(torch.float32, 64, depth=8 * STEPS)
    for both in go(kind, run, {name: FAMILIES[name] for name in names}, tmp_path, grace=STEPS):
        name, two = both.point.run.method.name, result(both)
        one = result(on_one_worker[name])
        for (step, a), (_, b) in zip(one["train_curve"], two["train_curve"], strict=True):
            assert abs(a - b) <= allowed * abs(a), f"{name}, step {step}: {a} and {b}"
        first, second = (AdapterArtifact.load(each["folder"]) for each in (one, two))
        assert set(first.modules) == set(second.modules)
        assert first.rank == second.rank == (8 if both.point.run.method.chain else 4)
        assert all(part.any() for f in second.modules.values() for part in f.b.split(4, 1))


@pytest.fixture(autouse=True, scope="module")
def _no_leaks(local_ray: None) -> Iterator[None]:
    """Worker groups must have given back what they held when the executors are closed."""
    before = ray.available_resources().get("CPU", 0)
    yield
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU", 0) >= before

"""A lane whose trials share steps: the search's decisions, a slot that diverges, and a lane that dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from rayft.methods.base import ChainConfig
from rayft.sweep.executor import EXECUTORS, Executor
from rayft.sweep.jobs import Job
from rayft.sweep.score import ScoreRequest
from rayft.sweep.search import Trial, search
from rayft.sweep.space import MethodSpace, SweepConfig, points
from rayft.train.run import RunConfig
from tests.integration.test_lanes import compare, find, long_run, make_run, result

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

SPACE = {
    "lora": MethodSpace(ranks=(2, 4), lr=(1e-2, 3e-3)),
    "cla": MethodSpace(ranks=(8,), lr=(1e-2,)),
    "c3la": MethodSpace(ranks=(4,), lr=(1e-2,), chain=ChainConfig(links=2)),
    "paca": MethodSpace(ranks=(4,), lr=(1e-3,)),
}
"""Seven trials, of which six can share steps."""


def executor_of(folder: Path, run: RunConfig, slots: int) -> Executor:
    name = f"p{time.time_ns()}"
    return EXECUTORS["lane"](run.scale, str(folder / "ray"), 1, 3, name, slots=slots)


@pytest.fixture(scope="module")
def packed(
    local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Executor]:
    """A lane with three slots."""
    executor = executor_of(tmp_path_factory.mktemp("packed"), make_run(tiny_folder), 3)
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def by_turns(
    local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trial]:
    """The trials of `SPACE`, and those of a long run, one after the other; none is stopped."""
    folder = tmp_path_factory.mktemp("turns")
    executor = executor_of(folder, make_run(tiny_folder), 1)
    trials = find(executor, make_run(tiny_folder), SPACE, folder / "short", grace=8)
    trials += find(executor, long_run(tiny_folder), {"lora": SPACE["lora"]}, folder / "long", grace=24)
    executor.close()
    return {trial.point.key: trial for trial in trials}


def test_packed_trials_are_those_that_take_turns(
    packed: Executor, by_turns: dict[str, Trial], tiny_folder: Path, tmp_path: Path
) -> None:
    trials = find(packed, make_run(tiny_folder), SPACE, tmp_path, grace=8)
    assert [trial.status for trial in trials] == ["finished"] * 7
    for trial in trials:
        alone = by_turns[trial.point.key]
        compare(result(alone), result(trial), 8)
        assert [step for step, _ in result(trial).val_curve] == [step for step, _ in result(alone).val_curve]


def test_scores_share_batches(packed: Executor, tiny_folder: Path, tmp_path: Path) -> None:
    run = make_run(tiny_folder)
    space = {"lora": MethodSpace(ranks=(2,)), "peft:DoRA": MethodSpace(ranks=(2,))}
    lora, dora = (result(trial).folder for trial in find(packed, run, space, tmp_path, grace=8))
    asked = {"base": None, "lora": lora, "dora": dora, "gone": str(tmp_path / "gone"), "again": lora}
    requests = {key: ScoreRequest(run, ("val", "test"), folder) for key, folder in asked.items()}
    jobs = {key: Job.of(f"{key}-{time.time_ns()}", one, pack=one.pack) for key, one in requests.items()}
    found = dict(packed.run([*jobs.values()]))
    outcomes = {key: found[job.id] for key, job in jobs.items()}
    assert "gone" in outcomes["gone"].error
    for key in ("base", "lora", "dora", "again"):
        scores = outcomes[key].result
        assert scores is not None, outcomes[key].error
        assert {part: len(values) for part, values in scores.items()} == {"val": 8, "test": 8}
    assert outcomes["lora"].result == outcomes["again"].result


def test_trials_that_the_search_stops_give_their_slots_to_others(
    packed: Executor, by_turns: dict[str, Trial], tiny_folder: Path, tmp_path: Path
) -> None:
    run = make_run(tiny_folder)
    space = {"lora": MethodSpace(ranks=(4,), lr=(1e-2, 1e-4, 2e-4, 3e-4, 5e-3, 1e-5))}
    trials = find(packed, run, space, tmp_path, grace=2)
    states = [trial.status for trial in trials]
    assert states[0] == "finished"
    assert "stopped" in states
    assert "failed" not in states
    first = next(one for one in by_turns.values() if one.point.name == trials[0].point.name)
    compare(result(first), result(trials[0]), 8)


def test_a_trial_that_diverges_ends_alone(
    packed: Executor, by_turns: dict[str, Trial], tiny_folder: Path, tmp_path: Path
) -> None:
    space = {"lora": MethodSpace(ranks=(2,), lr=(1e-2, 1e30, 3e-3))}
    good, bad, other = find(packed, make_run(tiny_folder), space, tmp_path, grace=8)
    assert bad.status == "failed"
    assert "use a lower learning rate" in bad.error
    for trial in (good, other):
        alone = next(one for one in by_turns.values() if one.point.name == trial.point.name)
        compare(result(alone), result(trial), 8)


def test_all_trials_of_a_lane_that_dies_go_on(
    packed: Executor, by_turns: dict[str, Trial], tiny_folder: Path, tmp_path: Path
) -> None:
    def kill() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            jobs = [job for job in ray.get(packed.broker.snapshot.remote()) if job.get("steps") == 24]
            running = [job for job in jobs if 24 > job.get("step", 0) >= 8]
            if len(running) == 3:
                for pid in running[0]["pids"]:
                    os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.01)
        raise AssertionError("the trials do not start")

    before = len(ray.get(packed.broker.notices.remote()))
    trials = find(packed, long_run(tiny_folder), {"lora": SPACE["lora"]}, tmp_path, kill, grace=24)
    for trial in trials:
        alone, again = result(by_turns[trial.point.key]), result(trial)
        compare(alone, again, 24)
        assert torch.tensor([loss for _, loss in again.val_curve]).isfinite().all()
    notices = ray.get(packed.broker.notices.remote(before))
    (died,) = [text for text in notices if "its process was killed or crashed" in text]
    assert all(trial.point.key in died for trial in trials[:3])


def test_an_interrupted_pack_saves_all_its_trials(
    by_turns: dict[str, Trial], tiny_folder: Path, tmp_path: Path
) -> None:
    run, saving = long_run(tiny_folder), list[str]()
    space = {"lora": SPACE["lora"]}
    executor = executor_of(tmp_path, run, 4)

    def interrupt() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            jobs = ray.get(executor.broker.snapshot.remote())
            if len([job for job in jobs if job.get("step", 0) >= 6]) == 4:
                break
            time.sleep(0.01)
        saving.extend(executor.interrupt()[0])

    trials = find(executor, run, space, tmp_path, interrupt, grace=24)
    executor.close()
    assert sorted(saving) == sorted(trial.point.key for trial in trials)
    # A lane in which trials take turns continues from what the pack has saved.
    alone = executor_of(tmp_path, run, 1)
    sweep = SweepConfig(methods=space, grace=24)
    for trial in search(sweep, points(sweep, run), alone, tmp_path):
        compare(result(by_turns[trial.point.key]), result(trial), 24)
    alone.close()

"""Lanes and isolated trials, with real Ray Train worker groups over gloo."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.exceptions
import torch
from mlflow import MlflowClient

from rayft.artifacts import AdapterArtifact
from rayft.data.source import DataConfig
from rayft.errors import DiskFullError
from rayft.methods.base import ChainConfig
from rayft.models.load import ModelConfig
from rayft.numerics import tolerance
from rayft.sweep.entrance import Entrance
from rayft.sweep.executor import EXECUTORS, Executor
from rayft.sweep.jobs import Job
from rayft.sweep.request import TrainRequest
from rayft.sweep.search import Trial, search
from rayft.sweep.space import MethodSpace, SweepConfig, points
from rayft.tracking.base import TrackerSpec
from rayft.tracking.mlflow import flush_spool
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig
from rayft.train.trainer import TrainResult
from tests.disks import Disk
from tests.integration.actors import pids, running
from tests.integration.memory import ShortOfMemory
from tests.processes import eventually

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


@contextmanager
def executing(kind: str, run: RunConfig, folder: Path) -> Iterator[Executor]:
    executor = EXECUTORS[kind](run.scale, str(folder / "ray"), 1, 3, f"t{time.time_ns()}")
    try:
        yield executor
    finally:
        executor.close()


@contextmanager
def meanwhile(act: Callable[[], None] | None) -> Iterator[None]:
    """Call a function in a thread while the block runs."""
    if act is None:
        yield
        return
    with ThreadPoolExecutor() as pool:
        done = pool.submit(act)
        yield
        done.result()


def find(
    executor: Executor,
    run: RunConfig,
    space: Mapping[str, MethodSpace],
    output: Path,
    during: Callable[[], None] | None = None,
    *,
    grace: int = 2,
) -> list[Trial]:
    """Search with an executor, and call a function meanwhile."""
    sweep = SweepConfig(methods=dict(space), grace=grace)
    with meanwhile(during):
        return search(sweep, points(sweep, run), executor, output)


def result(trial: Trial) -> TrainResult:
    assert trial.result is not None, trial.error
    return trial.result


def half_way(executor: Executor) -> list[int]:
    """Wait until a long run has taken a quarter of its steps, and return its lane's processes."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for job in ray.get(executor.broker.snapshot.remote()):
            taken = job.get("step", 0) if job["state"] == "running" else 0
            if job.get("steps") == LONG and LONG > taken >= LONG // 4:
                return list(job["pids"])
        time.sleep(0.01)
    raise AssertionError("the trial does not start")


LORA = {"lora": MethodSpace(ranks=(4,), lr=(1e-2, 1e-4))}
ONE = {"lora": MethodSpace(ranks=(4,), lr=(1e-2,))}
LONG = 24
"""Number of steps of a run that is disturbed in the middle."""


def long_run(folder: Path, **scale: Any) -> RunConfig:
    """Return a run with many evaluations and checkpoints."""
    run = make_run(folder, steps=LONG, **scale)
    return run.model_copy(update={"evaluate": EvaluateConfig(checkpoint_seconds=0, every=3)})


@pytest.fixture(scope="module")
def lane(local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    """A lane in which tests search one after the other, like the trials of a sweep."""
    with executing("lane", make_run(tiny_folder), tmp_path_factory.mktemp("lane")) as executor:
        yield executor


@pytest.fixture(scope="module")
def in_a_lane(lane: Executor, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    return find(lane, make_run(tiny_folder), LORA, tmp_path_factory.mktemp("two"))


def test_asha_stops_the_worse_trial_and_keeps_its_adapter(in_a_lane: list[Trial]) -> None:
    good, bad = in_a_lane
    assert (good.status, bad.status) == ("finished", "stopped")
    assert result(bad).steps == 2
    assert AdapterArtifact.load(result(bad).folder).content_hash == result(bad).content_hash


def test_a_lane_trains_like_an_isolated_worker_group(
    in_a_lane: list[Trial], tiny_folder: Path, tmp_path: Path
) -> None:
    run = make_run(tiny_folder)
    with executing("isolated", run, tmp_path) as executor:
        (alone,) = find(executor, run, {"lora": MethodSpace(ranks=(4,), lr=(1e-4,))}, tmp_path)
    shared = result(in_a_lane[1])
    steps = shared.steps
    # It is the lane's second trial, so anything that the first one left behind would show here.
    assert result(alone).train_curve[:steps] == shared.train_curve
    assert result(alone).val_curve[: len(shared.val_curve)] == shared.val_curve


@pytest.fixture(scope="module")
def whole(lane: Executor, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The result of the long run if nothing disturbs it."""
    return result(find(lane, long_run(tiny_folder), ONE, tmp_path_factory.mktemp("whole"))[0])


def test_a_lane_that_dies_is_restarted_and_its_trial_resumes(
    lane: Executor, whole: TrainResult, tiny_folder: Path, tmp_path: Path
) -> None:
    before = len(ray.get(lane.broker.notices.remote()))

    def kill() -> None:
        workers = half_way(lane)
        # The launcher has started them itself.
        assert not running("TrainController")
        for pid in workers:
            os.kill(pid, signal.SIGKILL)

    (trial,) = find(lane, long_run(tiny_folder), ONE, tmp_path, kill)
    assert trial.status == "finished"
    assert result(trial).seconds["total"] < whole.seconds["total"] + 60
    for name in ("content_hash", "train_curve", "val_curve"):
        assert getattr(result(trial), name) == getattr(whole, name)
    # There may be a notice of the checkpoint that was being written, too.
    notices = ray.get(lane.broker.notices.remote(before))
    assert any("its process was killed or crashed" in text for text in notices)


STEPS = 4
FAMILIES = {
    **{name: MethodSpace(ranks=(4,)) for name in ("lora_plus", "asym", "cla", "paca")},
    **{name: MethodSpace(ranks=(4,), chain=ChainConfig(links=2)) for name in ("rac", "rc3la")},
}


@pytest.fixture(scope="module")
def on_one_worker(
    lane: Executor, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trial]:
    run = make_run(tiny_folder, steps=STEPS)
    trials = find(lane, run, FAMILIES, tmp_path_factory.mktemp("one"), grace=STEPS)
    return {trial.point.run.method.name: trial for trial in trials}


def compare(one: TrainResult, two: TrainResult, steps: int) -> None:
    """Assert that two workers have the losses of one."""
    # Rounding of the forward and backward pass of each step, through 2 layers of 64-term sums.
    allowed = tolerance(torch.float32, 64, depth=8 * steps)
    for (step, a), (_, b) in zip(one.train_curve, two.train_curve, strict=True):
        assert abs(a - b) <= allowed * abs(a), f"step {step}: {a} and {b}"


def compare_families(on_one_worker: dict[str, Trial], trials: list[Trial]) -> None:
    for both in trials:
        one, two = result(on_one_worker[both.point.run.method.name]), result(both)
        compare(one, two, STEPS)
        first, second = (AdapterArtifact.load(each.folder) for each in (one, two))
        assert set(first.modules) == set(second.modules)
        assert first.rank == second.rank == (8 if both.point.run.method.chain else 4)
        assert all(part.any() for f in second.modules.values() for part in f.b.split(4, 1))


@pytest.fixture(scope="module")
def interrupted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trial], Path]:
    """Two workers train methods of each family, and are interrupted in the middle of a long run.

    Returns:
        The trials of the families, and the folder of the long run.
    """
    families, run = make_run(tiny_folder, steps=STEPS, workers=2), long_run(tiny_folder, workers=2)
    folder, saving = tmp_path_factory.mktemp("two-workers"), list[str]()
    with executing("lane", run, folder) as executor:
        trials = find(executor, families, FAMILIES, folder, grace=STEPS)

        def interrupt() -> None:
            half_way(executor)
            saving.extend(executor.interrupt()[0])

        (trial,) = find(executor, run, ONE, folder, interrupt)
    assert saving == [trial.point.key]
    assert trial.result is None
    return trials, folder


@pytest.fixture(scope="module")
def two_workers(
    interrupted: tuple[list[Trial], Path], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Executor]:
    """A lane of two workers that is started after the interruption."""
    with executing("lane", long_run(tiny_folder, workers=2), tmp_path_factory.mktemp("second")) as executor:
        yield executor


def test_two_workers_train_like_one(
    on_one_worker: dict[str, Trial], interrupted: tuple[list[Trial], Path]
) -> None:
    compare_families(on_one_worker, interrupted[0])


def test_two_workers_that_were_interrupted_continue_together(
    interrupted: tuple[list[Trial], Path], two_workers: Executor, whole: TrainResult, tiny_folder: Path
) -> None:
    (trial,) = find(two_workers, long_run(tiny_folder, workers=2), ONE, interrupted[1])
    compare(whole, result(trial), LONG)
    assert len(result(trial).val_curve) == len(whole.val_curve)


def test_a_group_whose_step_does_not_fit_continues_with_smaller_batches(
    two_workers: Executor, tiny_folder: Path, tmp_path: Path, spec: TrackerSpec
) -> None:
    run = long_run(tiny_folder, workers=2)
    run = run.model_copy(update={"optim": OptimConfig(steps=8, rows_per_step=4), "seed": 3})
    single = run.model_copy(
        update={"scale": run.scale.model_copy(update={"accumulation": 2, "activation_checkpointing": True})}
    )
    before = len(ray.get(two_workers.broker.notices.remote()))
    requests = [
        ShortOfMemory("fits", "fits", run, str(tmp_path), (), room=1),
        TrainRequest("whole", "whole", run, str(tmp_path), ()),
        # Its group ends, and the next test gets a new one.
        ShortOfMemory("never", "never", single, str(tmp_path), (), tracker=spec, room=0),
    ]
    found = dict(two_workers.run([Job.of(request.key, request) for request in requests]))
    fits, whole = (found[name].result for name in ("fits", "whole"))
    assert fits is not None
    assert whole is not None
    assert (fits.result.placement["accumulation"], whole.result.placement["accumulation"]) == (2, 1)
    compare(whole.result, fits.result, 8)
    assert "1 row(s) of 512 tokens do not fit into the device's memory at once: " in found["never"].error
    assert ray.get(two_workers.broker.notices.remote(before)) == [
        "fits: step 5 with 2 row(s) at a time did not fit into the device's memory; the run starts again "
        "from its last checkpoint, and goes on with 1"
    ]
    # The second worker has recorded it, since the first one waited for it.
    assert not flush_spool(spec).pending
    (tracked,) = MlflowClient(spec.uri).search_runs([spec.experiment_id])
    assert tracked.info.status == "FAILED"


def test_a_full_disk_ends_both_workers(two_workers: Executor, tiny_folder: Path, disk: Disk) -> None:
    def fill() -> None:
        half_way(two_workers)
        disk.leave(0)

    # After this error the lane takes no other job, so no test uses it afterwards.
    with pytest.raises(DiskFullError, match=str(disk.folder)):
        find(two_workers, long_run(tiny_folder, workers=2), ONE, disk.folder / "out", fill)


# tests/unit/train/test_partition.py has two workers under ZeRO-3, without Ray.
@pytest.mark.exhaustive
def test_two_workers_under_zero_3_train_like_one(
    on_one_worker: dict[str, Trial], tiny_folder: Path, tmp_path: Path
) -> None:
    # A chain has frozen A's, which are partitioned too, and an engine for each link.
    run = make_run(tiny_folder, steps=STEPS, workers=2, zero=3)
    with executing("isolated", run, tmp_path) as executor:
        compare_families(on_one_worker, find(executor, run, {"rac": FAMILIES["rac"]}, tmp_path, grace=STEPS))


def test_a_search_without_its_broker_ends_and_can_be_continued(
    lane: Executor, whole: TrainResult, tiny_folder: Path, tmp_path: Path
) -> None:
    run, others = long_run(tiny_folder), pids("Broker")
    with executing("lane", run, tmp_path) as executor:

        def kill() -> None:
            half_way(executor)
            for pid in {*pids("Broker")} - {*others}:
                os.kill(pid, signal.SIGKILL)

        with pytest.raises(ray.exceptions.RayError):
            find(executor, run, ONE, tmp_path, kill)
    (trial,) = find(lane, run, ONE, tmp_path)
    assert result(trial).content_hash == whole.content_hash


def test_lanes_on_other_disks_get_their_files_after_the_process_that_has_them_was_killed(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with executing("lane", make_run(tiny_folder), tmp_path) as executor:
        host = ray.get(executor.entrance.home.launcher.file_host.remote())
        sizes = ray.get(host.files.remote(str(tiny_folder)))
        for pid in pids("FileHost"):
            os.kill(pid, signal.SIGKILL)
        found, deadline = None, time.monotonic() + 120
        while found is None and time.monotonic() < deadline:
            with suppress(ray.exceptions.ActorUnavailableError):
                found = ray.get(host.files.remote(str(tiny_folder)))
        assert found == sizes
    eventually(lambda: not running("FileHost"), "it outlives its executor", 30)


def test_a_command_may_have_more_jobs_than_ray_lets_an_actor_have_calls(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job[Any, str](str(number), "score", b"") for number in range(1100)]
    with executing("lane", make_run(tiny_folder), tmp_path) as executor:
        pull, finish = executor.broker.pull.remote, executor.broker.finish.remote

        def serve() -> None:
            with suppress(ray.exceptions.RayError):
                while isinstance(job := ray.get(pull("lane")), Job):
                    ray.get(finish(job.id, pickle.dumps(job.id)))

        lane = threading.Thread(target=serve, daemon=True)
        monkeypatch.setattr(Entrance, "start_lane", lambda *_, **__: lane.start())
        # Without an answer, all would wait forever.
        late = threading.Timer(120, ray.kill, [executor.broker])
        late.start()
        found = {name: outcome.result for name, outcome in executor.run(jobs)}
        late.cancel()
    assert found == {one.id: one.id for one in jobs}


def test_a_trial_about_which_tune_can_not_decide_any_more_is_trained_to_its_end(
    lane: Executor, whole: TrainResult, tiny_folder: Path, tmp_path: Path
) -> None:
    before = len(ray.get(lane.broker.notices.remote()))

    def kill() -> None:
        half_way(lane)
        for pid in pids("ResourceTrainable"):
            os.kill(pid, signal.SIGKILL)

    # The second trial needs the lane that the first one has.
    sweep = SweepConfig(methods=LORA, grace=2, restarts=0)
    with meanwhile(kill):
        left, _ = trials = search(sweep, points(sweep, long_run(tiny_folder)), lane, tmp_path)
    assert [trial.status for trial in trials] == ["finished", "stopped"]
    assert result(left).content_hash == whole.content_hash
    (notice,) = ray.get(lane.broker.notices.remote(before))
    assert notice == f"{left.point.key}: the search can't decide about it any more, so it trains to its end"


@pytest.fixture(autouse=True, scope="module")
def _no_leaks(local_ray: None) -> Iterator[None]:
    """Check that worker groups have released their resources when the executors are closed."""
    before = ray.available_resources().get("CPU", 0)
    yield
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU", 0) >= before

"""The reasons for the end of Ray's processes, the message of waiting lanes, lanes that start at the same
time, and a search that Ray's memory monitor interrupts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
from ray.train import ScalingConfig
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from rayft.sweep import lane_trainer, launcher
from rayft.sweep.launcher import waiting_text
from rayft.sweep.reasons import NODE_LOST, UNREACHABLE, why_ended
from rayft.sweep.search import _run_tune
from rayft.sweep.settings import Group
from rayft.sweep.space import MethodSpace, SweepConfig

OUT_OF_MEMORY = """8 worker(s) were killed due to the node running low on memory. Memory on the node \
(IP: 10.0.0.2, ID: 9131c1) was 11.94GB used / 23.59GB limit (0.506418)
OOM kill reason: Memory usage 12698775552B exceeded threshold of 12662634496B (50.0% of 25325268992B limit)
Ray killed 8 worker(s) based on the killing policy
Selected to kill: (Actor(99681b): job ID=01000000, task name=PreemptionWatcher.__init__, pid=17967)
Top 10 memory users: PID	MEM(GB)	COMMAND"""
DEAD = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR\nRay's advice"

NODE_DIED = "The actor is dead because its node has died. Node Id: 7f2a"
AWAY = (
    "The actor 34987c is unavailable: RpcError: failed to connect to all addresses; Connection reset by peer"
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ray.exceptions.OutOfMemoryError(OUT_OF_MEMORY), "the machine ran out of memory; lower sweep.lanes"),
        (ray.exceptions.ActorDiedError(), "its process was killed or crashed"),
        (WorkerHealthCheckFailedError(NODE_DIED, failure=RuntimeError()), NODE_LOST),
        (WorkerHealthCheckFailedError(AWAY, failure=RuntimeError()), UNREACHABLE),
        (WorkerHealthCheckFailedError(DEAD, failure=RuntimeError()), "its process was killed or crashed"),
        (
            WorkerHealthCheckFailedError(OUT_OF_MEMORY, failure=RuntimeError()),
            "the machine ran out of memory",
        ),
        (ValueError("first\nlast"), "ValueError: last"),
        (ValueError(), "ValueError: no reason was given"),
    ],
)
def test_the_reason_for_an_end_is_one_line(error: Exception, words: str) -> None:
    assert words in why_ended(error)
    assert "\n" not in why_ended(error)


class Tuner:
    """A tuner whose calls of `fit` end as `ends` says."""

    def __init__(self, ends: Iterator[Exception | None]) -> None:
        self._ends = ends

    def fit(self) -> None:
        if (end := next(self._ends)) is not None:
            raise RuntimeError("Tune ended") from end


def test_waiting_lanes_report_what_they_need_and_what_is_free() -> None:
    group = Group(2, True, {"CPU": 1, "GPU": 0.5}, "/runs")
    total = {"head (10.0.0.1)": {"CPU": 4.0}, "one (10.0.0.2)": {"CPU": 8.0, "GPU": 1.0}}
    free = {"head (10.0.0.1)": {"CPU": 4.0}, "one (10.0.0.2)": {"CPU": 7.0, "GPU": 0.5}}
    text = waiting_text(1, group, total, free)
    assert "1 lane waits for a place in the cluster; each lane needs 2 times 1 CPU and 0.5 GPU" in text
    assert "head (10.0.0.1): 4 of 4 CPU, 0 of 0 GPU; one (10.0.0.2): 7 of 8 CPU, 0.5 of 1 GPU" in text
    assert waiting_text(3, group, total, free).startswith("3 lanes wait ")


def test_lanes_are_watched_after_ray_did_not_answer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: Iterator[list[object] | BaseException] = iter([RuntimeError("no answer"), [], SystemExit()])

    def waiting() -> list[object]:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(launcher, "WAITING_SECONDS", 0.04)
    monkeypatch.setattr(launcher, "_waiting", waiting)
    checked: list[str] = []
    broker = SimpleNamespace(check_starts=SimpleNamespace(remote=lambda: checked.append("starts")))
    with pytest.raises(SystemExit):
        launcher.Launcher(Group(1, False, {}, "/runs"))._watch(broker)
    assert checked == ["starts"]


def test_a_search_continues_after_ray_killed_a_trials_process_for_memory() -> None:
    full = ray.exceptions.OutOfMemoryError(OUT_OF_MEMORY)
    sweep = SweepConfig(methods={"lora": MethodSpace()}, restarts=2)

    def run(*ends: Exception | None) -> list[Exception | None]:
        """Return the ends that were not reached."""
        left = iter(ends)
        _run_tune(sweep, lambda: Tuner(left))  # type: ignore[arg-type,return-value]
        return list(left)

    assert run(full, full, None, full) == [full]
    with pytest.raises(ray.exceptions.OutOfMemoryError):
        run(full, full, full, None)
    with pytest.raises(RuntimeError, match="Tune ended"):
        run(ValueError("something else"), None)


def test_a_group_whose_workers_can_not_talk_gives_back_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[object] = []

    def start(group: object) -> None:
        raise RuntimeError("no interface")

    monkeypatch.setattr(lane_trainer.WorkerGroup, "_start", start)
    monkeypatch.setattr(lane_trainer.WorkerGroup, "shutdown", lambda group: ended.append(group))
    group = lane_trainer._WorkerGroup.__new__(lane_trainer._WorkerGroup)
    with pytest.raises(RuntimeError, match="no interface"):
        group._start()
    assert ended == [group]
    assert lane_trainer._Controller.worker_group_cls is lane_trainer._WorkerGroup


def test_lanes_that_start_at_the_same_time_are_all_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over, watches = threading.Event(), list[str]()
    monkeypatch.setattr(launcher.Launcher, "_hold", lambda *_: over.wait())
    monkeypatch.setattr(launcher.Launcher, "_watch", lambda *_: watches.append("watch"))
    rounds, lanes = 20, 3
    for _ in range(rounds):
        found, barrier = launcher.Launcher(Group(1, False, {}, "/runs")), threading.Barrier(lanes)

        def start(number: int, found: Any = found, barrier: Any = barrier) -> None:
            barrier.wait()
            found.start(SimpleNamespace(name=f"lane{number}", broker=None))

        with ThreadPoolExecutor(lanes) as pool:
            list(pool.map(start, range(lanes)))
        assert len(found._lanes) == lanes
    over.set()
    assert len(watches) == rounds


def test_a_lane_starts_while_the_log_of_another_one_is_locked() -> None:
    """Ray Train's own set-up waits for the locks of all handlers while it holds the one of `logging`. A
    handler that opens its file waits the other way round."""
    settings = dict.fromkeys(("train_fn_ref", "scaling_policy", "failure_policy"))
    config = SimpleNamespace(logging_config=SimpleNamespace(log_level="INFO"))
    context = SimpleNamespace(get_run_config=lambda: config)

    def start() -> None:
        trainer = lane_trainer.LaneTrainer.__new__(lane_trainer.LaneTrainer)
        # The controller sets up its process before it notices that it has no run.
        with pytest.raises(AttributeError, match="run_config"):
            trainer._initialize_and_run_controller(**settings, callbacks=[], train_run_context=context)

    handler = logging.StreamHandler()
    with ThreadPoolExecutor() as pool:
        with handler.lock:  # type: ignore[union-attr]
            started = pool.submit(start)
            _, waiting = wait([started], timeout=10.0)
        assert not waiting
        started.result()


def test_a_lane_has_no_process_for_ray_data(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[type] = []

    class Controller:
        def __init__(self, callbacks: list[object]) -> None:
            given.extend(type(one) for one in callbacks)

        async def run(self) -> None: ...

        def get_result(self) -> SimpleNamespace:
            return SimpleNamespace(error=None)

    monkeypatch.setattr(lane_trainer, "_Controller", lambda *, callbacks, **_: Controller(callbacks))
    lane_trainer.LaneTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=1)).fit()
    assert BackendSetupCallback in given
    assert DatasetsCallback not in given


def test_a_lane_that_can_not_be_started_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ImportError("libcudart.so is missing")

    monkeypatch.setattr(launcher, "_fit", fail)
    settings: Any = SimpleNamespace()
    assert launcher._run(settings, Group(1, False, {}, "/runs")) == "ImportError: libcudart.so is missing"

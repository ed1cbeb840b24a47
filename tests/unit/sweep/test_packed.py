"""The lane's side of packed trials, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayft.data.section import DataConfig
from rayft.errors import DiskFullError
from rayft.sweep import packed as module
from rayft.sweep.jobs import Job
from rayft.sweep.packed import SETTLE_SECONDS, PackedScores, PackedTrials
from rayft.sweep.score import BATCHES, ScoreRequest
from rayft.train.course import Clock, CrowdedError, Question
from rayft.train.run import EvaluateConfig, RunConfig
from rayft.train.slots import Sizing


class Lane:
    """Records what a lane is told."""

    name = "lane"

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.over: list[tuple[str, object]] = []
        self.alone: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def run_alone(self, job: Job[Any, Any]) -> None:
        self.alone.append(job.id)

    def ended(self, job: Job[Any, Any], result: object) -> None:
        self.over.append((job.id, result))


def test_a_pack_without_room_takes_fewer_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Pack", lambda *_, **__: None)
    lane, left = (
        Lane(),
        {"b": CrowdedError("no room", intact=True), "c": CrowdedError("no room", intact=True)},
    )
    trials: Any = PackedTrials(lane, None, Job("a", "train", b""), Sizing(8))  # type: ignore[arg-type]
    trials._courses = type("Some", (), {"ended": lambda _: left, "__len__": lambda _: 2})()
    trials._jobs = {key: Job(key, "train", b"") for key in "abcd"}
    trials._trials = dict.fromkeys("abcd")
    trials._end()
    assert trials._slots == 2
    assert lane.over == [*left.items()]
    (note,) = lane.notes
    assert note.startswith("b, c: no room in the device's memory beside")
    assert "now trains 2 at a time" in note


def test_the_evaluations_of_a_rung_go_to_the_broker_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any of them is asked about, so that the search can decide on all at the same time."""
    monkeypatch.setattr(module, "Pack", lambda *_, **__: None)
    calls: list[tuple[str, object]] = []
    answered: list[str] = []

    def reporter(key: str, last: int) -> Any:
        def ask(step: int, _: object) -> str | None:
            calls.append(("report", key))
            return f"verdict on {key}" if step < last else None

        return SimpleNamespace(reporter=SimpleNamespace(must_ask=lambda step: step < last, ask=ask))

    announce = SimpleNamespace(remote=lambda due: calls.append(("announce", due)))
    lane: Any = Lane()
    lane.broker, lane.timed = SimpleNamespace(announce=announce), lambda _: nullcontext()
    trials: Any = PackedTrials(lane, None, Job("a", "train", b""), Sizing(8))  # type: ignore[arg-type]
    trials._trials = {key: reporter(key, 20) for key in "abc"} | {"end": reporter("end", 10)}
    questions = {key: Question(10, {"val_loss": number}) for number, key in enumerate([*"abc", "end"])}
    trials._courses = SimpleNamespace(questions=questions, answer=lambda key, _: answered.append(key))
    # The search has still to decide on an earlier evaluation of one of them.
    trials._verdicts = {"c": "pending"}
    trials._ask()
    due = [("a", 10, {"val_loss": 0}), ("b", 10, {"val_loss": 1})]
    assert calls == [("announce", due), ("report", "a"), ("report", "b"), ("report", "end")]
    assert [*trials._verdicts] == ["c", "a", "b"]
    assert answered == ["end"]
    trials._ask()
    assert calls[4:] == [("report", "end")], "an evaluation was passed on twice"


def test_a_trial_that_waits_for_a_decision_does_not_hold_up_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "Pack", lambda *_, **__: None)
    decided: dict[str, str] = {}
    waited: list[float | None] = []

    def wait(references: list[str], *, num_returns: int, timeout: float | None = None) -> Any:
        waited.append(timeout)
        if timeout is None:
            assert num_returns == 1
            decided[references[0]] = "stop"
        return [one for one in references if one in decided][:num_returns], []

    monkeypatch.setattr(module.ray, "wait", wait)
    monkeypatch.setattr(module.ray, "get", decided.get)
    lane: Any = Lane()
    lane.timed = lambda _: nullcontext()
    trials: Any = PackedTrials(lane, None, Job("a", "train", b""), Sizing(8))  # type: ignore[arg-type]
    answers: list[tuple[str, bool]] = []

    class Courses:
        def __len__(self) -> int:
            return 2

        def answer(self, key: str, go_on: bool) -> None:
            answers.append((key, go_on))

    trials._courses = Courses()
    reporter = SimpleNamespace(decided=lambda verdict: verdict != "stop")
    trials._trials = dict.fromkeys("ab", SimpleNamespace(reporter=reporter))
    trials._hear()
    assert waited == [], "nobody asks"
    trials._verdicts, trials._new = {"a": "of a"}, True
    trials._hear()
    trials._hear()
    # b takes its next step soon, and the steps after that at once.
    assert waited == [SETTLE_SECONDS, 0.0]
    assert answers == []
    decided["of a"] = "continue"
    trials._hear()
    assert answers == [("a", True)]
    assert trials._verdicts == {}
    trials._verdicts, trials._new = {"a": "again of a", "b": "of b"}, True
    waited.clear()
    trials._hear()
    # Nobody can take a step, so it waits for one decision, however long.
    assert waited == [SETTLE_SECONDS, None]
    assert answers[1:] == [("a", False)]
    assert [*trials._verdicts] == ["b"]


def test_an_evaluation_that_can_not_be_tracked_ends_its_trial_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pack: Any = SimpleNamespace()
    monkeypatch.setattr(module, "Pack", lambda *_, **__: pack)
    full, left = DiskFullError("the disk is full"), list[str]()

    def ask(*_: object) -> str:
        raise full

    def course(key: str) -> Any:
        try:
            yield Question(10, {"val_loss": 1.0})
        finally:
            left.append(key)

    lane: Any = Lane()
    lane.broker = SimpleNamespace(announce=SimpleNamespace(remote=lambda _: None))
    trials: Any = PackedTrials(lane, None, Job("a", "train", b""), Sizing(8))  # type: ignore[arg-type]
    for key, asked in (("bad", ask), ("good", lambda *_: "verdict")):
        reporter = SimpleNamespace(must_ask=lambda _: True, ask=asked)
        trials._trials[key] = SimpleNamespace(reporter=reporter)
        trials._jobs[key] = Job(key, "train", b"")
        trials._courses.begin(key, course(key), Clock())
    trials._ask()
    trials._end()
    assert lane.over == [("bad", full)]
    assert left == ["bad"], "its place is free"
    assert trials._verdicts == {"good": "verdict"}
    assert [*trials._courses.questions] == ["good"]


def scored(
    monkeypatch: pytest.MonkeyPatch, together: Callable[..., Any], pull: Callable[..., Any], first: Any
) -> Any:
    """Score jobs on a CPU; return what the lane was told."""
    monkeypatch.setattr(module.ray, "get", lambda found: found)
    monkeypatch.setattr(module, "score_together", together)
    lane: Any = Lane()
    lane.broker = SimpleNamespace(pull=SimpleNamespace(remote=pull))
    session: Any = SimpleNamespace(
        parts=SimpleNamespace(test=range(100)), worker=SimpleNamespace(device="cpu"), home=None
    )
    PackedScores(lane, session, first).run()
    return lane


def requested(examples: int) -> ScoreRequest:
    data = DataConfig(source="jsonl", name="unused.jsonl")
    run = RunConfig(data=data, evaluate=EvaluateConfig(batch_size=5))
    return ScoreRequest(run, ("test",), examples=examples)


@pytest.mark.parametrize("examples", [1, 10, 40])
def test_a_cpu_keeps_scores_after_few_batches(monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    """Jobs that fill some batches are scored and reported before the next ones are taken."""
    waiting = [Job.of(f"{number}", requested(examples), pack="one") for number in range(8)]
    first, events = waiting.pop(0), list[str]()

    def pull(*_: object) -> Job[Any, Any] | None:
        return waiting.pop(0) if waiting else None

    def together(requests: Any, *_: object) -> dict[str, object]:
        events.append("+".join(requests))
        return {key: {"test": [1.0] * examples} for key in requests}

    lane = scored(monkeypatch, together, pull, first)
    assert events == ["+".join(f"{number}" for number in range(min(8, max(1, 5 * BATCHES // examples))))]
    assert [key for key, _ in lane.over] == events[0].split("+")


def test_jobs_that_can_not_be_scored_together_are_scored_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = [Job.of(f"{number}", requested(10), pack="one") for number in range(3)]

    def together(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    lane = scored(monkeypatch, together, lambda *_: waiting.pop(0) if waiting else None, waiting.pop(0))
    assert lane.alone == ["0", "1"], "of four batches"
    assert lane.over == []

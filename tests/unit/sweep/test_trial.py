"""How the tracked run of a trial ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayft.data.section import DataConfig
from rayft.errors import ConfigError, DiskFullError, InterruptedRunError, TrainError
from rayft.sweep import trial as module
from rayft.sweep.jobs import NewGroupError
from rayft.sweep.request import TrainRequest
from rayft.sweep.trial import TrialCourse
from rayft.tracking.base import TrackerSpec
from rayft.train.course import CrowdedError, TrainResult, drive
from rayft.train.home import Home
from rayft.train.placement import DeviceMemoryError, Placement
from rayft.train.run import RunConfig


class Tracker:
    """Records how runs end."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def run(self, *_: object, **__: object) -> str:
        return "id"

    def params(self, *_: object) -> None:
        pass

    def metrics(self, *_: object) -> None:
        pass

    def finish(self, _: str, status: str) -> None:
        self.ended.append(status)


@pytest.fixture
def tracker() -> Tracker:
    return Tracker()


@pytest.fixture
def lane(tracker: Tracker) -> Any:
    worker = SimpleNamespace(rank=0, world=1, together=nullcontext)
    return SimpleNamespace(name="lane", worker=worker, home=Home(), tracker=lambda _: tracker)


@pytest.fixture
def request_(tmp_path: Path) -> TrainRequest:
    run = RunConfig(data=DataConfig(source="jsonl", name="rows.jsonl"))
    spec = TrackerSpec("sqlite:///x.db", "x", tmp_path)
    return TrainRequest("t", "t", run, str(tmp_path), (), tracker=spec, parent="sweep")


def trainer(error: BaseException | None) -> Any:
    """Return a class in place of `Trainer`, whose course raises an error."""

    class Raises:
        def __init__(self, *_: object, **__: object) -> None: ...

        def course(self) -> Iterator[Any]:
            yield "a step"
            if error is not None:
                raise error
            return TrainResult(
                True, 1, 1.0, [(1, 1.0)], seconds={"total": 1.0, "overhead": 0.0, "train": 1.0}
            )

    return Raises


@pytest.mark.parametrize(
    ("error", "raised", "ended"),
    [
        (TrainError("the loss is nan"), TrainError, ["failed"]),
        # What no one has foreseen, as an error of torch.
        (RuntimeError("an illegal memory access"), RuntimeError, ["failed"]),
        (InterruptedRunError("interrupted", 3), InterruptedRunError, ["interrupted"]),
        (CrowdedError("no room", intact=True), CrowdedError, ["interrupted"]),
        (DeviceMemoryError("take less"), DeviceMemoryError, ["failed"]),
        # A new group goes on with it.
        (DeviceMemoryError("take less", Placement(2)), NewGroupError, []),
        # Nothing can be written.
        (DiskFullError("full"), DiskFullError, []),
    ],
)
def test_a_run_that_raises_is_ended(
    lane: Any,
    tracker: Tracker,
    request_: TrainRequest,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    raised: type[Exception],
    ended: list[str],
) -> None:
    monkeypatch.setattr(module, "Trainer", trainer(error))
    course = TrialCourse(request_, lane, None, 0.0).course()  # type: ignore[arg-type]
    with pytest.raises(raised):
        drive(course, lambda _: None)
    assert tracker.ended == ended


def test_a_trial_whose_course_can_not_be_planned_has_failed(
    lane: Any, tracker: Tracker, request_: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("a link would not train")

    monkeypatch.setattr(module, "Trainer", refuse)
    with pytest.raises(ConfigError):
        TrialCourse(request_, lane, None, 0.0)  # type: ignore[arg-type]
    assert tracker.ended == ["failed"]


def test_a_trial_whose_settings_can_not_be_tracked_has_failed(
    lane: Any, tracker: Tracker, request_: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("other values")

    monkeypatch.setattr(tracker, "params", refuse)
    with pytest.raises(ValueError, match="other values"):
        TrialCourse(request_, lane, None, 0.0)  # type: ignore[arg-type]
    assert tracker.ended == ["failed"]


def test_a_trial_whose_result_can_not_be_kept_has_failed(
    lane: Any, tracker: Tracker, request_: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Trainer", trainer(None))
    monkeypatch.setattr(module, "write_result", lambda *_: {}["missing"])
    session: Any = SimpleNamespace(identity=SimpleNamespace(brief=request_.expected))
    course = TrialCourse(request_, lane, session, 0.0).course()
    with pytest.raises(KeyError):
        drive(course, lambda _: None)
    assert tracker.ended == ["finished", "failed"]

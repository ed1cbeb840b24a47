"""The lane's side of packed trials, without Ray."""

from __future__ import annotations

from typing import Any

import pytest

from rayft.sweep import packed as module
from rayft.sweep.jobs import Job
from rayft.sweep.packed import PackedTrials
from rayft.train.course import CrowdedError
from rayft.train.slots import Sizing


class Lane:
    """Records what a lane is told."""

    name = "lane"

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.over: list[tuple[str, object]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

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

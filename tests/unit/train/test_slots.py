"""How many runs share their steps: the choice among what was measured."""

from __future__ import annotations

import pytest
import torch

from rayft.train import slots
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.slots import Sizing, choose, sizing


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # One run's step fills the device: four take four times as long.
        ({1: 1.0, 4: 3.9}, 1),
        ({1: 1.0, 4: 2.0, 16: 7.9}, 4),
        ({1: 1.0, 4: 2.0, 16: 6.0}, 16),
        ({1: 1.0, 4: 2.0, 16: None}, 4),
        ({1: None}, 1),
    ],
)
def test_the_fewest_slots_are_taken_that_are_as_fast(seconds: dict[int, float | None], expected: int) -> None:
    assert choose(seconds.__getitem__) == expected


def test_timed_passes_leave_the_base_as_it_was(
    run: RunConfig, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots.torch.cuda, "synchronize", lambda: None)
    before = {name: value.clone() for name, value in session.loaded.model.state_dict().items()}
    assert slots._seconds(run, session, 3) is not None
    after = session.loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(value.equal(after[name]) for name, value in before.items())


def test_rows_that_do_not_fit_have_no_time(
    run: RunConfig, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(slots, "mask_for", full)
    assert slots._seconds(run, session, 3) is None


def test_on_a_cpu_runs_take_turns_unless_slots_are_set(run: RunConfig, session: Session) -> None:
    assert sizing(run, session, None) == Sizing()
    assert sizing(run, session, 5) == Sizing(5)

"""How many runs share their steps: the choice among what was measured."""

from __future__ import annotations

import pytest

from rayft.train import slots
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.slots import Sizing, choose, sizing

GRAPHS, EAGER = True, False


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # One run's step fills the device: four take four times as long.
        ({(1, GRAPHS): 1.0, (4, GRAPHS): 3.9}, Sizing()),
        ({(1, GRAPHS): 1.0, (4, GRAPHS): 2.0, (16, GRAPHS): 7.9, (4, EAGER): 3.0}, Sizing(4, graphs=True)),
        ({(1, GRAPHS): 1.0, (4, GRAPHS): 2.0, (16, GRAPHS): 6.0, (16, EAGER): 7.0}, Sizing(16, graphs=True)),
        # Rows are much shorter than a graph's.
        ({(1, GRAPHS): 1.0, (4, GRAPHS): 2.0, (16, GRAPHS): 6.0, (16, EAGER): 5.0}, Sizing(16)),
        ({(1, GRAPHS): 1.0, (4, GRAPHS): 2.0, (16, GRAPHS): None, (4, EAGER): 3.0}, Sizing(4, graphs=True)),
        ({(1, GRAPHS): None}, Sizing()),
    ],
)
def test_the_fewest_slots_are_taken_that_are_as_fast(
    seconds: dict[tuple[int, bool], float | None], expected: Sizing
) -> None:
    assert choose(lambda size: seconds[size.slots, size.graphs], graphs=True) == expected


def test_without_graphs_only_passes_without_them_are_tried() -> None:
    tried = []

    def seconds(size: Sizing) -> float:
        tried.append(size)
        return float(size.slots) ** 0.5

    assert choose(seconds, graphs=False) == Sizing(16)
    assert tried == [Sizing(1), Sizing(4), Sizing(16)]


def test_a_measured_step_leaves_the_base_as_it_was(
    run: RunConfig, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots.torch.cuda, "synchronize", lambda: None)
    before = {name: value.clone() for name, value in session.loaded.model.state_dict().items()}
    assert slots._seconds(run, session, Sizing(3)) is not None
    after = session.loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(value.equal(after[name]) for name, value in before.items())


def test_on_a_cpu_runs_take_turns_unless_slots_are_set(run: RunConfig, session: Session) -> None:
    assert sizing(run, session, None) == Sizing()
    assert sizing(run, session, 5) == Sizing(5)

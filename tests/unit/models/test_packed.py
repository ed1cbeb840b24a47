"""Adapters of several slots in one model."""

from __future__ import annotations

import pytest
import torch

from rayft.kernels.grouped_linear import Plan
from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.models import packed as module
from rayft.models.inject import inject
from rayft.models.packed import Layout, pack, skeleton
from rayft.models.targets import linears
from rayft.numerics import assert_close


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that are made."""
    found: list[Plan] = []

    class Counted(Plan):
        def __init__(self, terms: object) -> None:
            super().__init__(terms)  # type: ignore[arg-type]
            found.append(self)

    monkeypatch.setattr(module, "Plan", Counted)
    return found


@pytest.mark.parametrize("training", [True, False])
def test_a_division_of_the_rows_is_planned_once(made: list[Plan], *, training: bool) -> None:
    base = torch.nn.Sequential(AdapterLinear(torch.nn.Linear(6, 5)))
    slots = {number: skeleton(base) for number in (3, 4)}
    for number, own in slots.items():
        inject(own, MethodConfig(rank=2, targets=("0",)), number)
        for layer in linears(own).values():
            torch.nn.init.normal_(layer.adapter.lora_B)  # type: ignore[union-attr,arg-type]
    layout = Layout()
    pack(base, slots, layout)
    x = torch.randn(4, 7, 6)

    def compute(owners: list[int], width: int, *, train: bool) -> torch.Tensor:
        base.train(train)
        layout.enter(owners, width)
        return base(x[: len(owners), :width])  # type: ignore[no-any-return]

    # As many other divisions as are kept, such as those of a validation, leave the plan of training alone.
    first = compute([3, 3, 4, 4], 7, train=training)
    for width in range(1, 7):
        for owners in ([3, 4], [3, 3, 4], [4, 4]):
            compute(owners, width, train=not training)
    assert len(made) == 19
    assert torch.equal(compute([3, 3, 4, 4], 7, train=training), first)
    assert len(made) == 19
    for number, part in ((3, first[:2]), (4, first[2:])):
        alone = slots[number].eval()(x[2 * number - 6 :][:2])
        assert_close(part, alone, torch.float32, 6)
    # Those that were used last are kept.
    compute([4, 4], 6, train=not training)
    assert len(made) == 19
    compute([3, 4], 1, train=not training)
    assert len(made) == 20

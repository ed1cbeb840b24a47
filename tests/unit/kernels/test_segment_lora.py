from __future__ import annotations

import dataclasses

import pytest
import torch

from rayft.kernels.segment_lora import SlotFactors, reference, segment_lora, segments
from rayft.numerics import assert_close, relative_error, tolerance

INPUTS, OUTPUTS = 37, 23


def lora(rank: int, dtype: torch.dtype = torch.float32) -> SlotFactors:
    a, b = torch.randn(rank, INPUTS), torch.randn(OUTPUTS, rank)
    return SlotFactors(b=b.to(dtype), scale=0.7, a=a.to(dtype))


def selector(columns: list[int], dtype: torch.dtype = torch.float32) -> SlotFactors:
    b = torch.randn(OUTPUTS, len(columns)).to(dtype)
    return SlotFactors(b=b, scale=1.3, columns=torch.tensor(columns))


def run(
    slots: list[int], table: dict[int, SlotFactors], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the kernel's result, the reference's, and the output before both."""
    x = torch.randn(len(slots), INPUTS).to(dtype)
    before = torch.randn(len(slots), OUTPUTS).to(dtype)
    after = before.clone()
    segment_lora(x, after, segments(slots), table)
    return after, reference(x, before, slots, table), before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "slots",
    [
        pytest.param([1], id="one token"),
        pytest.param([0, 0, 1, 1, 1, 2, 3, 3], id="neighbours"),
        pytest.param([3, 1, 0, 2, 1, 3, 0, 1, 4], id="scattered"),
        pytest.param([4] * 13, id="one slot"),
    ],
)
def test_it_agrees_with_the_reference(slots: list[int], dtype: torch.dtype) -> None:
    table = {1: lora(1, dtype), 2: lora(5, dtype), 3: lora(16, dtype), 4: selector([36, 0, 7, 7], dtype)}
    actual, expected, before = run(slots, table, dtype)
    assert relative_error(actual, before) > 0.1
    assert_close(actual, expected, dtype, INPUTS, depth=3)


def test_base_tokens_and_unknown_slots_are_left_alone() -> None:
    actual, _, before = run([0, 1, 0, 9], {1: lora(4)})
    assert torch.equal(actual[[0, 2, 3]], before[[0, 2, 3]])
    assert not torch.equal(actual[1], before[1])


def test_a_batch_of_base_tokens_has_no_segments() -> None:
    assert segments([0, 0, 0]) == ()


def test_a_row_does_not_depend_on_the_others() -> None:
    table = {1: lora(2), 2: lora(8)}
    x, y = torch.randn(6, INPUTS), torch.zeros(6, OUTPUTS)
    segment_lora(x, y, segments([1, 2, 1, 0, 2, 1]), table)
    for row, slot in enumerate([1, 2, 1, 0, 2, 1]):
        alone = torch.zeros(1, OUTPUTS)
        segment_lora(x[row : row + 1], alone, segments([slot]), table)
        assert_close(y[row : row + 1], alone, torch.float32, INPUTS, depth=3)


def test_neighbours_become_a_slice_and_others_indices() -> None:
    found = {segment.slot: segment.rows for segment in segments([1, 1, 2, 3, 2])}
    assert found[1] == slice(0, 2)
    assert found[3] == slice(3, 4)
    assert isinstance(found[2], torch.Tensor)
    assert found[2].tolist() == [2, 4]


def test_a_slot_has_a_or_columns() -> None:
    b = torch.zeros(OUTPUTS, 2)
    with pytest.raises(AssertionError):
        SlotFactors(b=b, scale=1.0)
    with pytest.raises(AssertionError):
        SlotFactors(b=b, scale=1.0, a=torch.zeros(2, INPUTS), columns=torch.tensor([0, 1]))


def forget_scale(factors: SlotFactors) -> SlotFactors:
    return dataclasses.replace(factors, scale=1.0)


def shift_columns(factors: SlotFactors) -> SlotFactors:
    if factors.columns is None:
        return factors
    return dataclasses.replace(factors, columns=(factors.columns + 1) % INPUTS)


@pytest.mark.parametrize("mutate", [forget_scale, shift_columns])
def test_the_comparison_sees_mistakes(mutate: object) -> None:
    slots, table = [1, 2, 1, 0], {1: lora(3), 2: selector([0, 5])}
    x, before = torch.randn(4, INPUTS), torch.randn(4, OUTPUTS)
    wrong = before.clone()
    segment_lora(x, wrong, segments(slots), {slot: mutate(f) for slot, f in table.items()})  # type: ignore[operator]
    assert relative_error(wrong, reference(x, before, slots, table)) > tolerance(torch.float32, INPUTS, 3)

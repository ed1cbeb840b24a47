"""Tables, tiles and the plain version of the grouped kernels; tests/gpu has the Triton ones."""

from __future__ import annotations

import random
import struct
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rayft.kernels
from rayft.errors import TargetError
from rayft.kernels.grouped_lora import (
    AdapterTable,
    Group,
    Rows,
    Tuning,
    entry,
    grouped_lora,
    place,
    reference,
    tile_bound,
)
from rayft.kernels.launch_triton import Launcher
from rayft.kernels.segment_lora import SlotFactors
from rayft.numerics import assert_close, relative_error

GROUPS = (Group(24, {"q": 16, "k": 8, "v": 9}), Group(16, {"o": 24}))


def lora(rank: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> SlotFactors:
    return SlotFactors(
        b=torch.randn(outputs, rank).to(dtype), scale=0.7, a=torch.randn(rank, inputs).to(dtype)
    )


def table(dtype: torch.dtype = torch.float32, widest: int = 64) -> AdapterTable:
    """Slot 1 everywhere, slot 2 in q and v alone, where it selects inputs."""
    made = AdapterTable(4, GROUPS, dtype=dtype, device="cpu", widest=widest)
    made.set(1, {name: lora(3, inputs, size, dtype) for name, (size, inputs) in made.shapes.items()})
    columns = torch.tensor([23, 0, 5, 5])
    made.set(
        2,
        {
            name: SlotFactors(b=torch.randn(size, 4).to(dtype), scale=1.3, columns=columns)
            for name, size in (("q", 16), ("v", 9))
        },
    )
    return made


def batch(made: AdapterTable, slots: list[int]) -> tuple[Rows, torch.Tensor, list[torch.Tensor]]:
    rows = Rows(made, len(slots))
    rows.slots.copy_(torch.tensor(slots))
    rows.prepare()
    x = torch.randn(len(slots), 24).to(made.dtype)
    return rows, x, [torch.randn(len(slots), size).to(made.dtype) for size in (16, 8, 9)]


@pytest.mark.parametrize("accumulate", [True, False], ids=["added", "written"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[1], [0, 0, 2, 2, 1], [1, 2, 3, 0, 1, 2]], ids=str)
def test_it_agrees_with_the_reference(slots: list[int], dtype: torch.dtype, accumulate: bool) -> None:
    rows, x, ys = batch(table(dtype), slots)
    before = [y.clone() for y in ys]
    expected = reference(x, ys, rows, 0, accumulate=accumulate)
    grouped_lora(x, ys, rows, 0, accumulate=accumulate)
    for y, old, exact in zip(ys, before, expected, strict=True):
        assert_close(y, exact, dtype, 24, depth=3)
        untouched = [row for row, slot in enumerate(slots) if slot in (0, 3)]
        assert torch.equal(y[untouched], old[untouched] if accumulate else torch.zeros_like(old[untouched]))
    assert relative_error(ys[0], before[0]) > 0.1


@pytest.mark.parametrize("accumulate", [True, False], ids=["added", "written"])
def test_outputs_may_be_one_tensor(accumulate: bool) -> None:
    rows, x, ys = batch(table(), [0, 2, 1])
    y = torch.cat(ys, dim=1)
    grouped_lora(x, ys, rows, 0, accumulate=accumulate)
    grouped_lora(x, y, rows, 0, accumulate=accumulate)
    assert torch.equal(y, torch.cat(ys, dim=1))
    with pytest.raises(AssertionError, match="outputs of the group"):
        grouped_lora(x, y[:, :-1], rows, 0)


class Kernel:
    """A stand-in for a Triton kernel, also a compiled one, that records its launches: programs, arguments."""

    function, packed_metadata = 0, ()

    def __init__(self) -> None:
        self.compiled: list[tuple[object, ...]] = []
        self.direct: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Kernel]:
        def launch(*arguments: Any) -> Kernel:
            plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
            self.compiled.append((grid, *plain))
            return self

        return launch

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        self.direct.append(((x, y, z), *arguments[6:]))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernel]:
    """Replace Triton's kernels."""
    found = {"shrink": Kernel(), "expand": Kernel()}
    launchers = {name: Launcher(kernel) for name, kernel in found.items()}
    module = SimpleNamespace(
        launcher=lambda name, *_: launchers[name],
        launch_order=lambda *_: None,
        launch_describe=lambda *_: None,
    )
    monkeypatch.setitem(sys.modules, "rayft.kernels.grouped_lora_triton", module)
    monkeypatch.setattr(rayft.kernels, "grouped_lora_triton", module, raising=False)
    return found


@pytest.mark.parametrize("apart", [True, False], ids=["linears", "one tensor"])
def test_later_launches_pass_the_addresses_of_the_first(kernels: dict[str, Kernel], apart: bool) -> None:
    made = AdapterTable(
        4, [Group(32, {"q": 16, "k": 8, "v": 8}), Group(32, {"o": 16})], dtype=torch.float32, device="cpu"
    )
    rows, x, y = Rows(made, 5, kernels=True), torch.randn(5, 32), torch.zeros(5, 32)
    outputs = y.split((16, 8, 8), dim=1) if apart else y
    for _ in range(2):
        grouped_lora(x, outputs, rows, 0)
    for kernel in kernels.values():
        assert len(kernel.compiled) == len(kernel.direct) == 1
        assert kernel.compiled == kernel.direct
    # Another batch, other numbers of rows, and other tensors use the same kernels.
    other = Rows(made, 3, kernels=True)
    grouped_lora(
        x[:3], outputs[:3] if isinstance(outputs, torch.Tensor) else [one[:3] for one in outputs], other, 0
    )
    assert [len(kernel.direct) for kernel in kernels.values()] == [2, 2]


def test_tensors_unlike_the_first_are_launched_through_triton(kernels: dict[str, Kernel]) -> None:
    made = AdapterTable(4, [Group(32, {"o": 16})], dtype=torch.float32, device="cpu")
    rows, wide = Rows(made, 5, kernels=True), torch.zeros(5, 40)
    for x in (wide[:, :32], wide[:, 1:33]):
        grouped_lora(x, torch.zeros(5, 16), rows, 0)
    assert [len(kernel.compiled) for kernel in kernels.values()] == [2, 2]
    with pytest.raises(AssertionError, match="x is not of the table's"):
        grouped_lora(wide[:, :32].double(), torch.zeros(5, 16), rows, 0)
    with pytest.raises(AssertionError, match="neighbours"):
        grouped_lora(wide[:, :32], torch.zeros(16, 5).t(), rows, 0)


def test_a_layer_without_factors_is_left_alone() -> None:
    rows, x, ys = batch(table(), [2, 2])
    before = [y.clone() for y in ys]
    grouped_lora(x, ys, rows, 0)
    assert [torch.equal(y, old) for y, old in zip(ys, before, strict=True)] == [False, True, False]


def test_a_batch_is_the_one_that_was_prepared() -> None:
    rows, x, ys = batch(table(), [1, 2])
    with pytest.raises(AssertionError, match="prepared"):
        grouped_lora(x[:1], [y[:1] for y in ys], rows, 0)
    with pytest.raises(AssertionError):
        grouped_lora(x, ys[:2], rows, 0)


def test_an_entry_says_where_the_factors_lie() -> None:
    made = table()
    factors = made.layer(0, 0)[1]
    assert factors.a is not None
    entry = made.entries[1, 0].tolist()
    assert entry[:5] == [factors.a.data_ptr(), factors.b.data_ptr(), 0, 3, factors.b.stride(0)]
    assert struct.unpack("<f", struct.pack("<i", entry[5]))[0] == pytest.approx(0.7)
    selected = made.layer(0, 2)[2]
    assert selected.columns is not None
    assert made.entries[2, 2].tolist()[:4] == [0, selected.b.data_ptr(), selected.columns.data_ptr(), 4]
    assert not made.entries[2, 1].any(), "k has no factors of slot 2"
    assert not made.entries[[0, 3]].any()


def test_a_slot_is_replaced_and_cleared_as_a_whole() -> None:
    made = table()
    made.set(1, {"o": lora(5, 16, 24)})
    assert made.entries[1, :, 3].tolist() == [0, 0, 0, 5]
    assert [1 in layer for layer in made.layers] == [False, False, False, True]
    made.clear(1)
    assert not made.entries[1].any()
    assert not any(1 in layer for layer in made.layers)
    assert made.entries[2].any()


def pointed(made: AdapterTable, slot: int, of: int) -> torch.Tensor:
    """Copy the factors of a slot to one piece of memory, and point another slot to them."""
    memory, rows, end = torch.zeros(2**14, dtype=torch.uint8), [], 0

    def put(matrix: torch.Tensor) -> int:
        nonlocal end
        begin, size = end, matrix.numel() * matrix.element_size()
        memory[begin : begin + size] = matrix.contiguous().flatten().view(torch.uint8)
        end += -(-size // 16) * 16
        return memory.data_ptr() + begin

    for layer in made.layers:
        if (found := layer.get(of)) is None:
            rows.append([0] * 8)
            continue
        rank = found.b.shape[1]
        padded = torch.zeros(len(found.b), -(-rank // 8) * 8, dtype=made.dtype)
        padded[:, :rank] = found.b
        rows.append(
            entry(
                a=0 if found.a is None else put(found.a),
                b=put(padded),
                columns=0 if found.columns is None else put(found.columns),
                rank=rank,
                stride=padded.shape[1],
                scale=found.scale,
            )
        )
    made.point(slot, torch.tensor(rows), memory)
    return memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [1, 2])
def test_a_slot_may_point_to_memory_of_the_caller(of: int, dtype: torch.dtype) -> None:
    made = table(dtype)
    memory = pointed(made, 3, of)
    rows, x, ys = batch(made, [3, of, 0])
    x[1] = x[0]
    for y in ys:
        y[1] = y[0]
    before = [y.clone() for y in ys]
    grouped_lora(x, ys, rows, 0)
    assert all(torch.equal(y[0], y[1]) for y in ys)
    assert not torch.equal(ys[0][0], before[0][0])
    assert [3 in layer for layer in made.layers] == [of in layer for layer in made.layers]
    memory.zero_()
    assert not any(layer[3].b.any() for layer in made.layers if 3 in layer), "it is not copied"


@pytest.mark.parametrize("read", [True, False], ids=["read before", "not read before"])
def test_a_slot_has_the_first_ranks_of_another(read: bool) -> None:
    made = table()
    made.clear(1)
    pointed(made, 3, 2)
    if read:
        assert 3 in made.layer(0, 0)
    made.lower(1, 3, 2)
    assert made.entries[1, :, 3].tolist() == [min(rank, 2) for rank in made.entries[3, :, 3].tolist()]
    whole, lower = made.layer(0, 0)[3], made.layer(0, 0)[1]
    assert whole.b.shape[1] == 4
    assert torch.equal(lower.b, whole.b[:, :2])
    assert lower.columns is not None
    assert whole.columns is not None
    assert torch.equal(lower.columns, whole.columns[:2])
    assert (lower.scale, lower.b.data_ptr()) == (whole.scale, whole.b.data_ptr())
    for slot in (3, 1):
        made.clear(slot)
        assert not any(slot in layer for layer in made.layers)


def test_a_slot_that_pointed_elsewhere_is_replaced() -> None:
    made = table()
    pointed(made, 3, 2)
    made.set(3, {"o": lora(5, 16, 24)})
    assert [3 in layer for layer in made.layers] == [False, False, False, True]
    pointed(made, 3, 2)
    assert [3 in layer for layer in made.layers] == [2 in layer for layer in made.layers]


@pytest.mark.parametrize("slot", [0, 4, -1])
def test_only_slots_of_the_table_are_filled(slot: int) -> None:
    made = table()
    with pytest.raises(AssertionError, match="slot"):
        made.set(slot, {})
    with pytest.raises(AssertionError, match="slot"):
        made.point(slot, made.entries[1], torch.zeros(0))


def test_a_rank_that_is_too_large_is_the_users_mistake() -> None:
    made = table()
    with pytest.raises(TargetError, match=r"o: rank 65 is above 64.*squeeze"):
        made.set(1, {"o": lora(65, 16, 24)})
    assert made.layer(1, 0)[1].b.shape[1] == 3, "the former adapter is gone"


@pytest.mark.parametrize(
    "factors",
    [
        pytest.param(lora(3, 24, 24), id="inputs"),
        pytest.param(lora(3, 16, 16), id="outputs"),
        pytest.param(lora(3, 16, 24, torch.bfloat16), id="dtype"),
        pytest.param(SlotFactors(torch.zeros(24, 3), 1.0, columns=torch.zeros(2).long()), id="columns"),
    ],
)
def test_factors_of_another_shape_or_dtype_are_refused(factors: SlotFactors) -> None:
    with pytest.raises(AssertionError, match="o: "):
        table().set(1, {"o": factors})


def test_prefixes_of_a_squeezed_adapter_share_its_memory() -> None:
    wide, a = torch.randn(24, 16), torch.randn(16, 16)
    made = table()
    for slot, rank in ((1, 3), (2, 13)):
        made.set(slot, {"o": SlotFactors(b=wide[:, :rank], scale=1.0, a=a[:rank])})
        entry = made.entries[slot, 3].tolist()
        assert entry[:5] == [a.data_ptr(), wide.data_ptr(), 0, rank, 16]


@pytest.mark.parametrize(
    "b",
    [
        pytest.param(torch.randn(5, 3), id="short rows"),
        pytest.param(torch.randn(5, 20)[:, :3], id="rows of 20"),
        pytest.param(torch.randn(5, 16)[:, 3:7], id="starts within a vector"),
        pytest.param(torch.randn(3, 5).t(), id="transposed"),
        pytest.param(torch.randn(4 * 8 + 3).as_strided((5, 3), (8, 1)), id="ends with the memory"),
    ],
)
def test_a_matrix_that_is_not_aligned_is_copied_with_zeros(b: torch.Tensor) -> None:
    placed = place(b)
    assert torch.equal(placed, b)
    assert placed.data_ptr() != b.data_ptr()
    assert placed.data_ptr() % 16 == placed.stride(0) % 8 == 0
    assert not placed.as_strided((5, 8), placed.stride())[:, b.shape[1] :].any()
    assert place(placed).data_ptr() == placed.data_ptr(), "copied twice"


def tiles(slots: list[int], tile: int) -> int:
    return sum(-(-count // tile) for count in Counter(slots).values())


@pytest.mark.parametrize("n_slots", [2, 5, 40])
@pytest.mark.parametrize("tile", [8, 16])
def test_the_bound_of_tiles_holds_and_is_reached(tile: int, n_slots: int) -> None:
    draw = random.Random(0)
    for n in (1, 7, 16, 33, 100):
        for _ in range(100):
            assert tiles(draw.choices(range(n_slots), k=n), tile) <= tile_bound(n, n_slots, tile)
        distinct = min(n, n_slots)
        worst = [*range(distinct), *[0] * (n - distinct)]
        assert tiles(worst, tile) == tile_bound(n, n_slots, tile)


@pytest.mark.parametrize("inputs", [16, 50, 576, 2048, 8192, 14336])
@pytest.mark.parametrize("n_rows", [1, 32, 256, 4096])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_parts_cover_the_inputs(inputs: int, n_rows: int, slices: int) -> None:
    tuning = Tuning.choose(n_rows)
    chunk = tuning.chunk(n_rows, inputs, slices)
    parts = -(-inputs // chunk)
    assert chunk % tuning.inputs == 0
    assert 1 <= parts <= tuning.parts
    assert parts == 1 or chunk >= tuning.least


def test_rows_are_spread_over_the_device_unless_they_fill_it() -> None:
    assert 2048 // Tuning.choose(32).chunk(32, 2048, 3) == 4
    assert Tuning.choose(16384).chunk(16384, 2048, 3) == 2048

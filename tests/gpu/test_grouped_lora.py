"""The grouped kernels against their float64 reference.

They also run in Triton's interpreter, slowly and without graphs (that of 3.6 knows no products in bfloat16
and needs NumPy below 2.4, so two lines of its interpreter.py have to be mended first):

    TRITON_INTERPRET=1 python -m pytest -m gpu tests/gpu/test_grouped_lora.py
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch

from rayft.kernels.grouped_lora import (
    AdapterTable,
    Group,
    Rows,
    Tuning,
    grouped_linear,
    grouped_lora,
    reference,
    tile_bound,
)
from rayft.kernels.segment_lora import SlotFactors
from rayft.numerics import assert_close

pytestmark = pytest.mark.gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SLOTS = 12
RANKS = (1, 4, 8, 16, 17, 32, 33, 64, 70, 256)
"""Of slot 1, 2, …; slot 11 is never filled."""

SMALL = [
    pytest.param(1, 64, (48,), id="one row"),
    pytest.param(33, 72, (40, 16, 24), id="three linears"),
    pytest.param(70, 50, (33, 21), id="sizes that nothing divides"),
]
LARGE = [
    pytest.param(32, 2048, (2048, 512, 512), id="decoding"),
    pytest.param(256, 8192, (2048,), id="many rows, many inputs"),
    pytest.param(1500, 2048, (8192, 8192), id="a prefill"),
    pytest.param(700, 576, (576, 192, 192), id="SmolLM2"),
]
CASES = SMALL if INTERPRETED else SMALL + LARGE
TUNINGS = [
    pytest.param(Tuning(tile=8, inputs=16, least=16, outputs=16), id="many parts"),
    pytest.param(Tuning(tile=16, inputs=64, least=64, outputs=32, ranks=64), id="ranks by 64"),
    pytest.param(Tuning(tile=32, inputs=32, least=32, outputs=64, programs=12), id="three parts"),
    pytest.param(Tuning(tile=64, inputs=64, least=1024, outputs=64, parts=1), id="one part"),
    pytest.param(Tuning(tile=16, inputs=32, least=64, outputs=16, blocks=3), id="several blocks"),
    pytest.param(
        Tuning(tile=64, inputs=64, least=64, outputs=32, ranks=64, blocks=2, expand_stages=3),
        id="several blocks and parts, ranks by 64",
    ),
    pytest.param(
        Tuning(16, 64, 64, 32, blocks=4, expand_programs=12, expand_registers=128, together=True),
        id="low ranks of all linears at once, two of four blocks",
    ),
]
if not INTERPRETED:
    TUNINGS.append(pytest.param(replace(Tuning.choose(32), overlap=True), id="overlapping"))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def adapter(rank: int, inputs: int, outputs: int, dtype: torch.dtype, *, select: bool = False) -> SlotFactors:
    """Factors that are views: a prefix of a squeezed adapter, whose other columns hold NaN."""
    wide = torch.full((outputs, -(-rank // 8) * 8 + 16), torch.nan, device=DEVICE, dtype=dtype)
    wide[:, :rank] = random(outputs, rank, dtype=dtype)
    if select:
        columns = torch.randint(inputs, (rank,), device=DEVICE)
        return SlotFactors(b=wide[:, :rank], scale=0.7, columns=columns)
    a = (random(rank + 3, inputs) / inputs**0.5).to(dtype)
    return SlotFactors(b=wide[:, :rank], scale=1.3, a=a[:rank])


def fill(table: AdapterTable, *, shift: int = 0) -> None:
    """Put an adapter in each slot but the last; each linear lacks those of some, some select inputs."""
    for slot in range(1, SLOTS - 1):
        rank = RANKS[(slot - 1 + shift) % len(RANKS)]
        found = {
            name: adapter(rank, inputs, outputs, table.dtype, select=(slot + number) % 3 == 1)
            for number, (name, (outputs, inputs)) in enumerate(table.shapes.items())
            if (slot + number) % 5
        }
        table.set(slot, found)


def make(
    n: int, inputs: int, outputs: tuple[int, ...], dtype: torch.dtype, tuning: Tuning | None = None
) -> tuple[AdapterTable, Rows, torch.Tensor, list[torch.Tensor]]:
    """Return a filled table, prepared rows of random slots, x, and outputs that are views of one matrix."""
    torch.manual_seed(0)
    group = Group(inputs, {f"layer{number}": size for number, size in enumerate(outputs)})
    table = AdapterTable(SLOTS, [Group(24, {"other": 40}), group], dtype=dtype, device=DEVICE)
    fill(table)
    rows = Rows(table, n, tuning, kernels=True)
    assert rows.plan
    rows.plan.h.fill_(torch.nan)
    # Slots that don't exist are the base's.
    rows.slots.copy_(torch.randint(-1, SLOTS + 1, (n,)))
    rows.prepare()
    y = random(n, sum(outputs), dtype=dtype)
    return table, rows, random(n, inputs, dtype=dtype), list(y.split(outputs, 1))


def check(x: torch.Tensor, ys: list[torch.Tensor], rows: Rows, *, accumulate: bool = True) -> None:
    """Compare the rows of each slot with the reference, and the untouched ones bit by bit."""
    before = [y.clone() for y in ys]
    expected = reference(x, ys, rows, 1, accumulate=accumulate)
    grouped_lora(x, ys, rows, 1, accumulate=accumulate)
    for part, (y, old, exact) in enumerate(zip(ys, before, expected, strict=True)):
        table = rows.table.layer(1, part)
        for slot in set(rows.slots.tolist()):
            mine = rows.slots == slot
            if slot in table:
                rank = table[slot].b.shape[1]
                # h is rounded, and the sum, to which y had been rounded before.
                assert_close(y[mine], exact[mine], x.dtype, x.shape[1] + rank, depth=3)
            else:
                assert torch.equal(y[mine], old[mine] if accumulate else torch.zeros_like(old[mine]))


@pytest.mark.parametrize("accumulate", [True, False], ids=["added", "written"])
@pytest.mark.parametrize(("n", "inputs", "outputs"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_agrees_with_the_reference(
    n: int, inputs: int, outputs: tuple[int, ...], dtype: torch.dtype, accumulate: bool
) -> None:
    _, rows, x, ys = make(n, inputs, outputs, dtype)
    check(x, ys, rows, accumulate=accumulate)


@pytest.mark.parametrize("accumulate", [True, False], ids=["added", "written"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_cut_of_the_work_gives_the_same(tuning: Tuning, accumulate: bool) -> None:
    for outputs in ((72, 40), (40, 16, 24)):
        _, rows, x, ys = make(70, 192, outputs, torch.bfloat16, tuning)
        check(x, ys, rows, accumulate=accumulate)


@pytest.mark.parametrize("accumulate", [True, False], ids=["added", "written"])
def test_outputs_in_one_tensor_are_those_of_the_linears(accumulate: bool) -> None:
    _, rows, x, _ = make(33, 192, (72, 40), torch.bfloat16)
    # The second launch is the one that passes addresses, which it does not for outputs that are not aligned.
    for start in (0, 0, 1):
        wider = random(33, 120, dtype=torch.bfloat16)
        y = wider[:, start : start + 112]
        apart = [part.clone() for part in y.split((72, 40), 1)]
        grouped_lora(x, apart, rows, 1, accumulate=accumulate)
        rest = wider[:, [*range(start), *range(start + 112, 120)]].clone()
        grouped_lora(x, y, rows, 1, accumulate=accumulate)
        assert torch.equal(y, torch.cat(apart, 1))
        assert torch.equal(wider[:, [*range(start), *range(start + 112, 120)]], rest)


@pytest.mark.parametrize(
    ("change", "slabs"),
    [({}, 1), ({"slab": 70 * 32 * 2}, 5), ({"slab": 70 * 64 * 2}, 3), ({"after": 1 << 20}, 1)],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "not aligned"])
def test_the_product_is_added_in_slabs(change: dict[str, int], slabs: int, start: int) -> None:
    tuning = Tuning(tile=16, inputs=64, least=64, outputs=16, blocks=2, together=True, **change)
    _, rows, x, _ = make(70, 192, (72, 24, 16), torch.bfloat16, tuning)
    assert rows.plan
    assert len(rows.plan.slabs(1)) == slabs
    weight = random(112, 192, dtype=torch.bfloat16) / 8
    products = (x.double() @ weight.double().t()).split((72, 24, 16), 1)
    exact = reference(x, products, rows, 1)
    wide = torch.full((70, 120), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    # The second time, h of the first is overwritten before it is read.
    for _ in range(2):
        y = wide[:, start : start + 112]
        grouped_linear(x, y, weight, rows, 1)
        rows.plan.h.fill_(torch.nan)
        assert_close(y, torch.cat(exact, 1), torch.bfloat16, 192 + 256, depth=3)
        assert wide.isnan().sum() == 70 * 8


def test_other_rows_use_the_same_launches() -> None:
    table, rows, x, ys = make(300, 64, (48, 16), torch.bfloat16)
    check(x, ys, rows)
    for n in (299, 257, 300):
        other = Rows(table, n, kernels=True)
        other.slots.copy_(rows.slots[:n])
        other.prepare()
        check(x[:n], [y[:n] for y in ys], other)


@pytest.mark.parametrize("slots", [[0] * 40, [3] * 40, [0] * 39 + [10], [3] * 20 + [7] * 20], ids=str)
def test_slots_that_share_all_or_no_rows(slots: list[int]) -> None:
    _, rows, x, ys = make(40, 64, (48,), torch.bfloat16)
    rows.slots.copy_(torch.tensor(slots))
    rows.prepare()
    check(x, ys, rows)


def test_few_slots_make_few_tiles() -> None:
    table, rows, x, ys = make(300, 64, (48, 16), torch.bfloat16)
    rows = Rows(table, 300, distinct=3, kernels=True)
    assert rows.plan
    assert rows.plan._tiles.shape[1] == tile_bound(300, 3, rows.tuning.tile) < 300 // rows.tuning.tile + 4
    rows.slots.copy_(torch.tensor([0, 9, 3] * 100))
    rows.prepare()
    check(x, ys, rows)


def test_tiles_hold_every_row_once() -> None:
    table, rows, _, _ = make(70, 64, (48, 16), torch.float32, Tuning(8, 16, 16, 16))
    assert rows.plan
    slots = [slot if 0 < slot < SLOTS else 0 for slot in rows.slots.tolist()]
    bound = tile_bound(70, SLOTS, 8)
    for layer, factors in enumerate(table.layers):
        tiles = rows.plan._tiles[layer].tolist()
        assert len(tiles) == bound
        assert sum(tile[7] for tile in tiles) == 70
        seen: list[int] = []
        for entry, members in zip(tiles, rows.plan._rows.tolist(), strict=True):
            own = members[: entry[7]]
            assert entry[7] == 0 or entry[6] == len(seen)
            seen += own
            assert len({slots[row] for row in own}) <= 1
            held = factors.get(slots[own[0]]) if own else None
            assert entry[3] == (held.b.shape[1] if held else 0)
        assert sorted(seen) == list(range(70))
    used = Counter(slots)
    assert sum(tile[7] > 0 for tile in tiles) == sum(-(-count // 8) for count in used.values())


def test_a_row_has_the_same_bits_wherever_it_stands() -> None:
    _, rows, x, ys = make(33, 192, (72, 40), torch.bfloat16)
    first = [y.clone() for y in ys]
    grouped_lora(x, first, rows, 1)
    again = [y.clone() for y in ys]
    grouped_lora(x, again, rows, 1)
    order = torch.randperm(33, device=DEVICE)
    moved = [y[order].clone() for y in ys]
    rows.slots.copy_(rows.slots[order])
    rows.prepare()
    grouped_lora(x[order], moved, rows, 1)
    for one, other, there in zip(first, again, moved, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[order], there)


def test_a_slot_can_be_cleared_and_filled_again() -> None:
    table, rows, x, ys = make(33, 64, (48, 16), torch.bfloat16)
    table.clear(4)
    table.set(5, {"layer1": adapter(3, 64, 16, torch.bfloat16)})
    rows.prepare()
    check(x, ys, rows)


@pytest.mark.skipif(INTERPRETED, reason="graphs need a GPU")
@pytest.mark.parametrize("overlap", [False, True], ids=["apart", "overlapping"])
@pytest.mark.parametrize("n", [32, 600])
def test_one_graph_serves_whatever_the_table_holds(n: int, overlap: bool) -> None:
    tuning = replace(Tuning.choose(n), overlap=overlap)
    table, rows, x, ys = make(n, 576, (576, 192, 192), torch.bfloat16, tuning)
    other = random(n, 24, dtype=torch.bfloat16), [random(n, 40, dtype=torch.bfloat16)]

    def step() -> None:
        rows.prepare()
        grouped_lora(*other, rows, 0)
        grouped_lora(x, ys, rows, 1)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert rows.plan
    for shift in range(4):
        fill(table, shift=shift)
        if shift == 2:
            table.clear(3)
        rows.slots.copy_(torch.randint(0, SLOTS, (n,)))
        x.copy_(random(*x.shape))
        for y in ys:
            y.copy_(random(*y.shape))
        rows.plan.h.fill_(torch.nan)
        before = [y.clone() for y in ys]
        expected = reference(x, before, rows, 1)
        graph.replay()
        for y, exact in zip(ys, expected, strict=True):
            assert_close(y, exact, torch.bfloat16, 576 + 256, depth=3)

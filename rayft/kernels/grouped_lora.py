"""Add many adapters of different ranks to the outputs of linears that share an input, in two launches.

Semantics:

    for n in range(N):
        s = slots[n]                                    # slot 0 is the base
        for y, layer in zip(outputs, group):            # up to four linears that read x, as q, k and v do
            if the table has factors of s in layer:
                h_R = x[n, columns]         if s selects inputs      else x[n] @ A.T
                y[n] += scale * (h_R @ B.T)             # `=` where the group is written first, see below

The kernels read the make-up of a batch on the device: which slot a row belongs to (`Rows.slots`), and where
a slot's factors are (`AdapterTable.entries`). So a CUDA graph that was captured once serves any adapters,
including those loaded later. `Rows.prepare`, called once for a forward pass, sorts the rows by slot into
tiles of rows of one slot, and looks up the factors of every tile and layer. Then for each group of linears:

- `shrink`, a program for each tile, linear and part of the inputs, writes that part of x Aᵀ;
- `expand`, a program for each tile and some blocks of outputs, adds the parts up in a fixed order, which
  gives the same bits each time, and adds h Bᵀ to y.

Each adapter is read at its own rank, once for a tile. Programs for base rows and surplus programs end after
one load. A matrix unit needs tiles and ranks padded to 16, 32 or multiples of 64; the padding is zeros in
registers and in h. The rows of h are `AdapterTable.widest` numbers apart, and only a row's own are used.

Adding to y costs a read and a write of it. Where that counts, in a prefill, let the adapters write y first
(`accumulate=False`, which writes zeros where there is no adapter) and the base's product accumulate onto
it: the product's read of y is hidden behind the arithmetic.

Without a GPU, `segment_lora` computes the same.

Shapes: N rows, I inputs, O outputs, R the rank of one adapter, S slots. x (N × I), y (N × O), A (R × I),
B (O × R), columns (R,), slots (N,) int32.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from rayft.errors import TargetError
from rayft.kernels import segment_lora
from rayft.kernels.launch_triton import Launch, current_stream
from rayft.kernels.segment_lora import BASE_SLOT, Segment, SlotFactors

__all__ = [
    "DECODE",
    "FIELDS",
    "SLICES",
    "WIDEST",
    "AdapterTable",
    "Group",
    "Rows",
    "Tuning",
    "entry",
    "grouped_lora",
    "place",
    "reference",
    "tile_bound",
    "variant",
]

FIELDS = 8
"""Numbers of an entry: addresses of A, B and columns, rank, B's row stride, bits of the scale, and two spare
ones, which hold a tile's first row and number of rows in the entries that `Rows.prepare` copies."""
ADDRESSES, RANK = slice(3), 3
"""Where an entry has its addresses (0: there is no such matrix), and where its rank."""
ALIGNED, UNIT = 16, 8
"""Factors begin at multiples of 16 bytes, and rows of B at multiples of 8 numbers; see `place`."""
SLICES = 4
"""The most linears in a group."""
WIDEST = 256
"""The largest rank in a table, unless the table is made for another one."""
DECODE = 256
"""The most rows of a batch that is treated as decoding, with few rows for each slot."""


@dataclass(frozen=True)
class Group:
    """Linears that read the same input."""

    inputs: int
    outputs: Mapping[str, int]
    """Name of a linear → number of its outputs, in the order in which their y are passed."""

    def __post_init__(self) -> None:
        assert 1 <= len(self.outputs) <= SLICES, f"a group has one to {SLICES} linears"

    @cached_property
    def width(self) -> int:
        """Number of outputs of all linears."""
        return sum(self.outputs.values())


@dataclass(frozen=True)
class Tuning:
    """How the work is divided among programs; results depend on it in their last bits only."""

    tile: int
    """Rows of a tile: 8 or a larger power of 2."""
    inputs: int
    """Inputs that `shrink` multiplies at once: 16 or a larger power of 2."""
    least: int
    """The fewest inputs of one part."""
    outputs: int
    """Outputs of a block of `expand`: 16 or a larger power of 2."""
    ranks: int = 32
    """Ranks that `expand` multiplies at once where the rank is above 32: 32 or 64."""
    programs: int = 264
    """Programs that `shrink` aims at when it splits the inputs; two for each multiprocessor of an H100."""
    parts: int = 16
    """The most parts that the inputs are split into; `expand` reads them all."""
    shrink_warps: int = 4
    expand_warps: int = 4
    stages: int = 4
    """One more than the reads of inputs that are in flight in `shrink`."""
    blocks: int = 1
    """Blocks of outputs that a program of `expand` computes one after the other; it reads h once for them."""
    expand_stages: int = 1
    """One more than the reads of B that are in flight in `expand`."""
    shrink_registers: int = 0
    """The most registers of a thread of `shrink`, so that more programs run at a time; 0: no limit."""
    overlap: bool = False
    """Whether a kernel may start while the previous one ends (programmatic dependent launch, on Hopper)."""

    @classmethod
    def choose(cls, n_rows: int, device: torch.device | str = "cpu") -> Tuning:
        """Return the tuning for a number of rows: small tiles for decoding, larger ones for a prefill.

        The values for few rows were measured on an H100 (`benchmarks/bench_adapter_kernels.py --tune`).
        """
        device = torch.device(device)
        overlap = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        if n_rows > DECODE:
            return replace(PREFILL, overlap=overlap)
        tile = 8 if n_rows <= 32 else 16
        return cls(tile, 64, 512, 256, expand_warps=8, stages=5, overlap=overlap)

    def chunk(self, n_rows: int, inputs: int, slices: int) -> int:
        """Return the inputs of one part, a multiple of `self.inputs`, so that the parts fill the device."""
        programs = -(-n_rows // self.tile) * slices
        parts = max(1, min(self.programs // programs, self.parts, inputs // self.least))
        # A power of 2, because the kernels are compiled for each number of parts.
        parts = 1 << (parts.bit_length() - 1)
        return -(-inputs // (parts * self.inputs)) * self.inputs


PREFILL = Tuning(
    tile=64, inputs=64, least=1024, outputs=64, ranks=64, programs=1056, parts=4, blocks=8, expand_stages=3,
    shrink_registers=128,
)  # fmt: skip
"""The tuning for more than `DECODE` rows, measured on an H200 with 4,096 tokens over 32 adapters."""


def tile_bound(n_rows: int, n_slots: int, tile: int) -> int:
    """Return the most tiles that n rows can form, whatever their slots are."""
    distinct = min(n_rows, n_slots)
    return distinct + (n_rows - distinct) // tile


def _rows_at_once(n_rows: int) -> int:
    """Return how many rows `describe` reads at once."""
    return min(256, max(16, 1 << (n_rows - 1).bit_length()))


def variant(n_rows: int, groups: Sequence[Group], device: torch.device | str) -> tuple[object, ...]:
    """Return what the kernels are compiled for: equal for numbers of rows that need no other kernels."""
    tuning = Tuning.choose(n_rows, device)
    chunks = [tuning.chunk(n_rows, group.inputs, len(group.outputs)) for group in groups]
    return tuning, _rows_at_once(n_rows), *chunks


class AdapterTable:
    """The factors of every slot in every layer, and their addresses, for the kernels to read.

    A change affects the launches after it on the same stream. Factors should be allocated on that stream
    too, because the memory of a cleared slot can be reused there at once.
    """

    def __init__(
        self,
        slots: int,
        groups: Sequence[Group],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        widest: int = WIDEST,
    ) -> None:
        """Make an empty table.

        Args:
            slots: S, including the base's.
            groups: all linears of a model.
            dtype: of x, y and the factors.
            device: of x, y and the factors.
            widest: the largest rank that fits; it costs memory (see `scratch`), but no traffic.
        """
        assert widest % 64 == 0, "whole blocks of ranks"
        self.slots, self.groups, self.widest, self.dtype = slots, tuple(groups), widest, dtype
        names = [name for group in groups for name in group.outputs]
        self.shapes = {name: (size, group.inputs) for group in groups for name, size in group.outputs.items()}
        assert len(names) == len(self.shapes), "two linears of one name"
        self.first = [0]
        for group in groups:
            self.first.append(self.first[-1] + len(group.outputs))
        self._number = {name: number for number, name in enumerate(names)}
        self.entries = torch.zeros(slots, len(names), FIELDS, dtype=torch.int64, device=device)
        self._layers: list[dict[int, SlotFactors]] = [{} for _ in names]
        self._memory: dict[int, torch.Tensor] = {}
        """Slot that was filled by `point` → the memory with its factors."""
        self._unread: set[int] = set()
        """Those of them whose entries were not made into `SlotFactors` yet."""
        self._scratch = torch.empty(0, dtype=torch.float32, device=device)
        self._launches: dict[tuple[object, ...], Launches] = {}
        self._splits = sorted({(group.inputs, len(group.outputs)) for group in groups})

    def set(self, slot: int, factors: Mapping[str, SlotFactors]) -> None:
        """Put an adapter in a slot, in place of the slot's former one.

        Factors that are aligned as `place` requires are used without a copy, also views such as `b[:, :k]`
        and `a[:k]`; others are copied.

        Args:
            slot: 1 to S − 1.
            factors: name of a linear → its factors, in the table's dtype and on its device.

        Raises:
            TargetError: for a rank above `widest`.
        """
        assert BASE_SLOT < slot < self.slots, f"slot {slot} is not one of 1 to {self.slots - 1}"
        placed: dict[int, SlotFactors] = {}
        for name, found in factors.items():
            if found.b.shape[1] > self.widest:
                raise TargetError(
                    f"{name}: rank {found.b.shape[1]} is above {self.widest}, the largest that is served; "
                    "squeeze the adapter first"
                )
            self._check(name, found)
            placed[self._number[name]] = _placed(found)
        rows = [_entry(placed[n]) if n in placed else [0] * FIELDS for n in range(len(self._layers))]
        self.entries[slot].copy_(torch.tensor(rows, dtype=torch.int64))
        # The former factors may be freed only now, when no later launch reads them.
        self._forget(slot)
        for number, found in placed.items():
            self._layers[number][slot] = found

    def point(self, slot: int, entries: torch.Tensor, memory: torch.Tensor) -> None:
        """Put an adapter in a slot whose factors and entries were written to the device before.

        This costs the host the same for all adapters: neither it nor the device waits.

        Args:
            slot: 1 to S − 1.
            entries: an entry for each linear of the table, in its order, or zeros for a linear that has no
                factors (L × `FIELDS`, int64), on the table's device. The matrices lie as `place` requires.
            memory: bytes (uint8) to which all addresses of the entries point. The caller keeps them as they
                are until the slot is cleared.
        """
        assert BASE_SLOT < slot < self.slots, f"slot {slot} is not one of 1 to {self.slots - 1}"
        self.entries[slot].copy_(entries)
        self._forget(slot)
        self._memory[slot] = memory
        self._unread.add(slot)

    def lower(self, slot: int, of: int, rank: int) -> None:
        """Put the first ranks of an adapter, which another slot has by `point`, in a slot."""
        self.point(slot, self.entries[of], self._memory[of])
        self.entries[slot, :, RANK].clamp_(max=rank)

    def clear(self, slot: int) -> None:
        """Empty a slot; its rows are then computed as the base's."""
        assert slot != BASE_SLOT, "the base has no factors"
        self.entries[slot].zero_()
        self._forget(slot)

    @property
    def layers(self) -> list[dict[int, SlotFactors]]:
        """The factors of each linear: slot → factors.

        The kernels don't need them. Reading the factors of a slot that was filled by `point` waits for the
        device.
        """
        for slot in self._unread:
            rows = self.entries[slot].tolist()
            for layer, shape, row in zip(self._layers, self.shapes.values(), rows, strict=True):
                if row[RANK]:
                    layer[slot] = _factors(row, shape, self._memory[slot], self.dtype)
        self._unread.clear()
        return self._layers

    def layer(self, group: int, part: int) -> dict[int, SlotFactors]:
        """Return the factors of one linear of a group: slot → factors."""
        return self.layers[self.first[group] + part]

    def scratch(self, numbers: int) -> torch.Tensor:
        """Return memory for a count of float32 numbers.

        All batches share it, because one batch is computed at a time. When it grows, batches that asked
        for less keep the smaller memory that they got before.
        """
        if self._scratch.numel() < numbers:
            self._scratch = torch.empty(numbers, dtype=torch.float32, device=self.entries.device)
        return self._scratch[:numbers]

    def launches(self, n_rows: int, tuning: Tuning) -> Launches:
        """Return the launches of all groups for a number of rows."""
        chunks = {shape: tuning.chunk(n_rows, *shape) for shape in self._splits}
        key = tuning, *chunks.values()
        if key not in self._launches:
            self._launches[key] = Launches(self, tuning, chunks)
        return self._launches[key]

    def _forget(self, slot: int) -> None:
        self._memory.pop(slot, None)
        if slot in self._unread:
            self._unread.remove(slot)
            return
        for layer in self._layers:
            layer.pop(slot, None)

    def _check(self, name: str, factors: SlotFactors) -> None:
        (outputs, inputs), rank = self.shapes[name], factors.b.shape[1]
        assert factors.b.shape[0] == outputs, f"{name}: B {tuple(factors.b.shape)}, {outputs} outputs"
        assert factors.a is None or factors.a.shape == (rank, inputs), f"{name}: A is not {rank} × {inputs}"
        assert factors.columns is None or factors.columns.shape == (rank,), f"{name}: not {rank} columns"
        for matrix in (factors.a, factors.b):
            assert matrix is None or matrix.dtype == self.dtype, f"{name}: not {self.dtype}"
            assert matrix is None or matrix.device == self.entries.device, (
                f"{name}: not on the table's device"
            )


class GroupLaunch:
    """How the kernels of one group are launched under one tuning, for batches with equally many parts.

    The first launch for some strides goes through Triton. Later ones pass addresses to the compiled kernels,
    which keeps the host's work low: a prefill is often launched kernel by kernel, not as a graph.
    """

    def __init__(self, table: AdapterTable, group: int, tuning: Tuning, chunk: int) -> None:
        # Imported here, because a CPU has no Triton.
        from rayft.kernels import grouped_lora_triton

        known, launcher = table.groups[group], grouped_lora_triton.launcher
        sizes, itemsize = [*known.outputs.values()], table.dtype.itemsize
        self._inputs, self._dtype = known.inputs, table.dtype
        self._layer, self.parts = table.first[group], -(-known.inputs // chunk)
        # The kernel takes four outputs, and does not touch those beyond the group's number.
        self._linears, self._unused = len(sizes), SLICES - len(sizes)
        self._sizes = [*sizes, *sizes[:1] * self._unused]
        self._starts = [*[sum(sizes[:n]) * itemsize for n in range(len(sizes))], *[0] * self._unused]
        self._stream = current_stream(table.entries.device)
        self._shrink = launcher(
            "shrink", tuning.shrink_warps, tuning.stages, tuning.shrink_registers, tuning.overlap
        )
        self._expand = launcher("expand", tuning.expand_warps, tuning.expand_stages, 0, tuning.overlap)
        span = tuning.outputs * tuning.blocks
        self._shrink_programs = len(sizes) * self.parts
        self._expand_programs = sum(-(-size // span) for size in sizes)
        shape, padded = (FIELDS, table.widest, len(sizes), tuning.tile), 1 << (self.parts - 1).bit_length()
        self._shrink_constants = *shape, tuning.inputs, chunk, tuning.overlap
        ranks = tuning.ranks, self.parts, padded
        self._expand_constants = *shape, tuning.outputs, span, *ranks, tuning.overlap
        self._found: dict[tuple[Any, ...], tuple[Launch, Launch, Sequence[int]]] = {}
        """Strides and dtypes → the compiled kernels, and the row strides of the four outputs."""

    def launch(
        self, plan: Plan, x: torch.Tensor, y: torch.Tensor | Sequence[torch.Tensor], *, accumulate: bool
    ) -> None:
        """Add the adapters to the outputs y, or overwrite the outputs."""
        kinds: tuple[Any, ...]
        if isinstance(y, torch.Tensor):
            kinds, first = (y.stride(), y.dtype), y.data_ptr()
            one, two, three, four = self._starts
            y0, y1, y2, y3 = first + one, first + two, first + three, first + four
        else:
            kinds = tuple([(matrix.stride(), matrix.dtype) for matrix in y])
            y0, y1, y2, y3 = [matrix.data_ptr() for matrix in (*y, *[y[0]] * self._unused)]
        key = x.stride(), x.dtype, kinds, accumulate
        place, n_rows, n_tiles, found = x.data_ptr(), plan.n_rows, plan.n_tiles, self._found.get(key)
        # The kernels that are kept were compiled for aligned addresses.
        if found is None or (place | y0 | y1 | y2 | y3) % ALIGNED:
            self._compile(plan, x, y, key, accumulate=accumulate)
            return
        shrink, expand, row_strides = found
        stream, tiles, rows, h = self._stream(), plan.tiles(self._layer), plan.rows, plan.place
        shrink(
            self._shrink_programs, n_tiles, stream,
            place, tiles, rows, h, n_rows, self._inputs, x.stride(0), n_tiles,
        )  # fmt: skip
        expand(
            self._expand_programs, n_tiles, stream,
            y0, y1, y2, y3, tiles, rows, h, n_rows, *self._sizes, *row_strides, n_tiles,
        )  # fmt: skip

    def _compile(
        self,
        plan: Plan,
        x: torch.Tensor,
        y: torch.Tensor | Sequence[torch.Tensor],
        key: tuple[Any, ...],
        *,
        accumulate: bool,
    ) -> None:
        """Check the tensors, launch through Triton, and keep the kernels that it compiled."""
        ys = y.split(self._sizes[: self._linears], dim=1) if isinstance(y, torch.Tensor) else y
        for what, matrix in (("x", x), *(("y", matrix) for matrix in ys)):
            assert matrix.stride(1) == 1, f"{what}: numbers of a row must be neighbours"
            assert matrix.dtype == self._dtype, f"{what} is not of the table's {self._dtype}"
        places, n_rows, n_tiles = plan.tensors(self._layer), plan.n_rows, plan.n_tiles
        four = (*ys, *[ys[0]] * self._unused)
        row_strides = [matrix.stride(0) for matrix in four]
        shrink = (x, *places), (n_rows, self._inputs, x.stride(0), n_tiles), self._shrink_constants
        expand = (
            (*four, *places),
            (n_rows, *self._sizes, *row_strides, n_tiles),
            (*self._expand_constants, accumulate),
        )
        self._shrink((self._shrink_programs, n_tiles, 1), *shrink)
        self._expand((self._expand_programs, n_tiles, 1), *expand)
        shrink_found, expand_found = self._shrink.found(*shrink), self._expand.found(*expand)
        if shrink_found and expand_found:
            self._found[key] = shrink_found, expand_found, row_strides


class Launches:
    """The launches of all groups under one tuning, for numbers of rows that split the inputs alike."""

    def __init__(self, table: AdapterTable, tuning: Tuning, chunks: Mapping[tuple[int, int], int]) -> None:
        """Work out everything about the launches that is the same for all batches.

        Args:
            table: the adapters.
            tuning: how the work is divided.
            chunks: inputs and number of linears of a group → the inputs of one part.
        """
        self.groups = [
            GroupLaunch(table, number, tuning, chunks[group.inputs, len(group.outputs)])
            for number, group in enumerate(table.groups)
        ]
        self.most = max(
            len(group.outputs) * launch.parts for group, launch in zip(table.groups, self.groups, strict=True)
        )
        """The most parts of h that a group has."""


class Plan:
    """The buffers of a batch of N rows for the Triton kernels, and the launches over them."""

    def __init__(self, table: AdapterTable, n_rows: int, tuning: Tuning, distinct: int) -> None:
        from rayft.kernels import grouped_lora_triton

        self._kernels = grouped_lora_triton
        self._table, self._tuning, self._launches = table, tuning, table.launches(n_rows, tuning)
        self.n_rows, self.n_tiles = n_rows, tile_bound(n_rows, distinct, tuning.tile)
        device, layers = table.entries.device, table.entries.shape[1]
        # `prepare` writes everything that is read of these.
        self._sorted = torch.empty(n_rows, 4, dtype=torch.int32, device=device)
        self._rows = torch.empty(self.n_tiles, tuning.tile, dtype=torch.int32, device=device)
        self._tiles = torch.empty(layers, self.n_tiles, FIELDS, dtype=torch.int64, device=device)
        most = self._launches.most
        assert most * n_rows * table.widest < 2**31, "more rows than the kernels can count"
        self.h = table.scratch(most * n_rows * table.widest).view(most, n_rows, table.widest)
        self.rows, self.place = self._rows.data_ptr(), self.h.data_ptr()
        self._first, self._stride = self._tiles.data_ptr(), self.n_tiles * FIELDS * self._tiles.itemsize

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes, without h, which all plans of a table share."""
        return sum(buffer.nbytes for buffer in (self._sorted, self._rows, self._tiles))

    def tiles(self, layer: int) -> int:
        """Return the address of the entries of a linear's tiles, which those of the next linear follow."""
        return self._first + layer * self._stride

    def tensors(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Return the entries of a linear's tiles and of all linears after it, the rows of tiles, and h."""
        return self._tiles[layer:], self._rows, self.h

    def prepare(self, slots: torch.Tensor) -> None:
        """Sort the rows by slot, and look up the factors of every tile in every layer."""
        n_rows, tile = self.n_rows, self._tuning.tile
        self._kernels.launch_order(
            (-(-n_rows // 32), 1, 1), (slots, self._sorted), (n_rows, self._table.slots), (32, 256)
        )
        self._kernels.launch_describe(
            (self._tiles.shape[0], 1, 1),
            (self._sorted, self._table.entries, self._tiles, self._rows),
            (n_rows, self.n_tiles),
            (FIELDS, tile, _rows_at_once(n_rows)),
        )

    def add(
        self, x: torch.Tensor, y: torch.Tensor | Sequence[torch.Tensor], group: int, *, accumulate: bool
    ) -> None:
        """Add the adapters of a group's linears to their outputs, or overwrite the outputs."""
        self._launches.groups[group].launch(self, x, y, accumulate=accumulate)


class Rows:
    """The rows of a batch: the slot of each, and what the kernels derive from the slots."""

    def __init__(
        self,
        table: AdapterTable,
        count: int,
        tuning: Tuning | None = None,
        *,
        slots: torch.Tensor | None = None,
        distinct: int | None = None,
        kernels: bool | None = None,
    ) -> None:
        """Make the buffers for N rows, all of them the base's; a CUDA graph keeps their addresses.

        Args:
            table: the adapters.
            count: N.
            tuning: `Tuning.choose(N)` where not given.
            slots: the buffer that holds the rows' slots, (N,) int32; where not given, one of zeros is made.
            distinct: the most different slots that the rows may have, including the base's; where not
                given, any number. With few slots and many rows there are far fewer tiles, and each tile
                costs programs.
            kernels: whether to use the Triton kernels; where not given, whether the table is on a GPU.
        """
        self.table, self.count = table, count
        self.tuning = tuning or Tuning.choose(count, table.entries.device)
        if slots is None:
            slots = torch.zeros(count, dtype=torch.int32, device=table.entries.device)
        assert slots.shape == (count,), "a slot for each row"
        self.slots = slots
        self.segments: tuple[Segment, ...] = ()
        self.plan: Plan | None = None
        if table.entries.is_cuda if kernels is None else kernels:
            self.plan = Plan(table, count, self.tuning, min(distinct or table.slots, table.slots))

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes."""
        return self.slots.nbytes + (self.plan.nbytes if self.plan else 0)

    def prepare(self) -> None:
        """Read `slots` and the table, on the device: before each forward pass, and inside its CUDA graph."""
        if self.plan:
            self.plan.prepare(self.slots)
        else:
            self.segments = segment_lora.segments(self.slots.tolist(), self.slots.device)


def grouped_lora(
    x_NI: torch.Tensor,
    ys: torch.Tensor | Sequence[torch.Tensor],
    rows: Rows,
    group: int,
    *,
    accumulate: bool = True,
) -> None:
    """Add every row's adapter to the outputs of a group's linears, in place.

    Args:
        x_NI: the input of the linears.
        ys: their outputs (N × O), which may be views of a wider tensor; or one tensor with the columns of all
            of them, in the group's order, which is passed on with less work for the host.
        rows: the batch, prepared.
        group: index in the table's groups.
        accumulate: whether to add to y. If not, y is overwritten, with zeros where a row has no adapter.
    """
    known = rows.table.groups[group]
    assert x_NI.shape == (rows.count, known.inputs), "not the batch that was prepared"
    if isinstance(ys, torch.Tensor):
        assert ys.shape == (rows.count, known.width), "not the outputs of the group"
    else:
        assert [tuple(y.shape) for y in ys] == [(rows.count, size) for size in known.outputs.values()]
    if rows.plan:
        rows.plan.add(x_NI, ys, group, accumulate=accumulate)
        return
    if isinstance(ys, torch.Tensor):
        ys = ys.split([*known.outputs.values()], dim=1)
    for part, y_NO in enumerate(ys):
        if not accumulate:
            y_NO.zero_()
        segment_lora.segment_lora(x_NI, y_NO, rows.segments, rows.table.layer(group, part))


def reference(
    x_NI: torch.Tensor, ys: Sequence[torch.Tensor], rows: Rows, group: int, *, accumulate: bool = True
) -> list[torch.Tensor]:
    """Compute the results of `grouped_lora`, row by row and in float64, as new tensors."""
    slots = rows.slots.tolist()
    return [
        segment_lora.reference(
            x_NI, y_NO if accumulate else torch.zeros_like(y_NO), slots, rows.table.layer(group, part)
        )
        for part, y_NO in enumerate(ys)
    ]


def place(b: torch.Tensor) -> torch.Tensor:
    """Return B (O × R) in memory that the kernels can read: itself, or a copy.

    B may be a view of the first columns of a wider matrix. Its rows must begin at multiples of 8 numbers,
    because 8 numbers are loaded at once. A copy has zeros from R to the next such multiple.
    """
    used = -(-b.shape[1] // UNIT) * UNIT
    end = b.storage_offset() + (b.shape[0] - 1) * b.stride(0) + used
    aligned = b.data_ptr() % ALIGNED == 0 and b.stride(0) % UNIT == 0
    if aligned and b.stride(1) == 1 and end * b.element_size() <= b.untyped_storage().nbytes():
        return b
    copy = b.new_zeros(b.shape[0], used)
    copy[:, : b.shape[1]] = b
    return copy[:, : b.shape[1]]


def _placed(factors: SlotFactors) -> SlotFactors:
    a, columns = factors.a, factors.columns
    if a is not None and (not a.is_contiguous() or a.data_ptr() % ALIGNED):
        a = a.clone(memory_format=torch.contiguous_format)
    if columns is not None:
        columns = columns.to(factors.b.device, torch.int64).contiguous()
    return replace(factors, a=a, b=place(factors.b), columns=columns)


def _entry(factors: SlotFactors) -> list[int]:
    a, b, columns = factors.a, factors.b, factors.columns
    return entry(
        a=0 if a is None else a.data_ptr(),
        b=b.data_ptr(),
        columns=0 if columns is None else columns.data_ptr(),
        rank=b.shape[1],
        stride=b.stride(0),
        scale=factors.scale,
    )


def entry(*, a: int, b: int, columns: int, rank: int, stride: int, scale: float) -> list[int]:
    """Return the numbers of an entry (see `FIELDS`) for addresses of A, B and columns (0: there is none)."""
    (bits,) = struct.unpack("<i", struct.pack("<f", scale))
    return [a, b, columns, rank, stride, bits, 0, 0]


def _factors(
    numbers: Sequence[int], shape: tuple[int, int], memory: torch.Tensor, dtype: torch.dtype
) -> SlotFactors:
    """Return views of the matrices to which an entry of a linear (O × I) points."""
    a, b, columns, rank, stride, bits = numbers[:6]
    (scale,) = struct.unpack("<f", struct.pack("<i", bits))

    def view(address: int, rows: int, width: int, kind: torch.dtype) -> torch.Tensor:
        begin = address - memory.data_ptr()
        return memory[begin : begin + rows * width * kind.itemsize].view(kind).view(rows, width)

    return SlotFactors(
        b=view(b, shape[0], stride, dtype)[:, :rank],
        scale=scale,
        a=view(a, rank, shape[1], dtype) if a else None,
        columns=view(columns, 1, rank, torch.int64)[0] if columns else None,
    )

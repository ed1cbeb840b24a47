"""Add many adapters of different ranks to linears that share an input, by two launches in all.

Semantics:

    for n in range(N):
        s = slots[n]                                    # slot 0 is the base
        for y, layer in zip(outputs, group):            # up to three linears that read x, as q, k and v do
            if the table has factors of s in layer:
                h_R = x[n, columns]         if s selects inputs      else x[n] @ A.T
                y[n] += scale * (h_R @ B.T)             # `=` where the group is written first, see below

What a batch is made of is read on the device: whose row it is (`Rows.slots`), and where a slot's factors
lie (`AdapterTable.entries`). So a CUDA graph captured once serves any adapters, also such as are loaded
later. `Rows.prepare`, once for a forward, sorts the rows by slot into tiles of rows of one slot and looks
the factors of every tile and layer up. Then for each group of linears:

- `shrink`, a program for each tile, linear and part of the inputs, writes that part of x Aᵀ;
- `expand`, a program for each tile and block of outputs, adds the parts up in a fixed order (the same bits
  each time) and adds h Bᵀ to y.

Each adapter is read at its own rank, once for a tile; base rows and surplus programs end after one load.
What a matrix unit pads (rows of a tile and ranks to 16, 32 or multiples of 64) are zeros in registers and
in h. h lies at a distance of `AdapterTable.widest` numbers from row to row; only a row's own are touched.

Adding to y costs a read and a write of it. Where that counts, in a prefill, let the adapters write y first
(`accumulate=False`: zeros where there is none) and the base's product accumulate onto it, which hides its
read behind the arithmetic.

Elsewhere than on a GPU, `segment_lora` does it.

Shapes: N rows, I inputs, O outputs, R the rank of one adapter, S slots. x (N × I), y (N × O), A (R × I),
B (O × R), columns (R,), slots (N,) int32.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from rayft.errors import TargetError
from rayft.kernels import segment_lora
from rayft.kernels.segment_lora import BASE_SLOT, Segment, SlotFactors

if TYPE_CHECKING:
    from rayft.kernels.grouped_lora_plan import Plan

__all__ = [
    "DECODE",
    "FIELDS",
    "SLICES",
    "AdapterTable",
    "Group",
    "Rows",
    "Tuning",
    "grouped_lora",
    "place",
    "reference",
    "tile_bound",
]

FIELDS = 8
"""Numbers of an entry: addresses of A, B and columns, rank, B's row stride, bits of the scale; two are spare
and hold a tile's first row and its number of rows once it is looked up."""
ALIGNED, UNIT = 16, 8
"""Factors begin at multiples of so many bytes, rows of B at multiples of so many numbers; see `place`."""
SLICES = 3
"""Linears that one group may have."""
DECODE = 256
"""Rows up to which a batch is taken to have few for each slot."""


@dataclass(frozen=True)
class Group:
    """Linears that read the same input."""

    inputs: int
    outputs: Mapping[str, int]
    """Name of a linear → its number of outputs, in the order in which their y are given."""

    def __post_init__(self) -> None:
        assert 1 <= len(self.outputs) <= SLICES, f"a group has one to {SLICES} linears"


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; results depend on it in their last bits only."""

    tile: int
    """Rows of a tile: 8 or a larger power of 2."""
    inputs: int
    """Inputs that `shrink` takes at once: 16 or a larger power of 2."""
    least: int
    """Inputs of one part, at least."""
    outputs: int
    """Outputs of a block of `expand`: 16 or a larger power of 2."""
    ranks: int = 32
    """Ranks that `expand` takes at once, above 32: 32 or 64."""
    programs: int = 264
    """Programs that `shrink` splits the inputs for; two for each multiprocessor of an H100."""
    parts: int = 16
    """Parts that the inputs are split into, at most; `expand` reads them all."""
    shrink_warps: int = 4
    expand_warps: int = 4
    stages: int = 4
    """Reads of inputs in flight in `shrink`, and one."""
    overlap: bool = False
    """Whether a kernel may start while the one before it ends (programmatic dependent launch, Hopper)."""

    @classmethod
    def choose(cls, n_rows: int, device: torch.device | str = "cpu") -> Tuning:
        """Choose for a number of rows: small tiles for decoding, larger ones for a prefill.

        By measurement on an H100 (`benchmarks/bench_adapter_kernels.py --tune`).
        """
        device = torch.device(device)
        overlap = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        if n_rows > DECODE:
            return cls(64, 64, 512, 64, programs=132, parts=4, overlap=overlap)
        tile = 8 if n_rows <= 32 else 16
        return cls(tile, 64, 512, 256, expand_warps=8, stages=5, overlap=overlap)

    def chunk(self, n_rows: int, inputs: int, slices: int) -> int:
        """Give the inputs of one part, a multiple of `self.inputs`: so many parts fill the device."""
        programs = -(-n_rows // self.tile) * slices
        parts = max(1, min(self.programs // programs, self.parts, inputs // self.least))
        return -(-inputs // (parts * self.inputs)) * self.inputs


def tile_bound(n_rows: int, n_slots: int, tile: int) -> int:
    """Give how many tiles n rows can make at most, whatever their slots are."""
    distinct = min(n_rows, n_slots)
    return distinct + (n_rows - distinct) // tile


class AdapterTable:
    """The factors of every slot in every layer, and where they lie, for the kernels to read.

    Changes act on what is launched after them on the same stream; factors should be allocated on it too,
    since the memory of a cleared slot is free for other use there at once.
    """

    def __init__(
        self,
        slots: int,
        groups: Sequence[Group],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        widest: int = 256,
    ) -> None:
        """Make an empty table.

        Args:
            slots: S, the base's with it.
            groups: all linears of a model.
            dtype: of x, y and the factors.
            device: where they are.
            widest: the largest rank that it takes; it costs address space (see `scratch`), no traffic.
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
        self.layers: list[dict[int, SlotFactors]] = [{} for _ in names]
        self._scratch = torch.empty(0, dtype=torch.float32, device=device)

    def set(self, slot: int, factors: Mapping[str, SlotFactors]) -> None:
        """Put an adapter in a slot, in place of what the slot held.

        Factors are used where they lie, views such as `b[:, :k]` and `a[:k]` too, if they are aligned as
        `place` says; others are copied.

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
        rows = [_entry(placed[n]) if n in placed else [0] * FIELDS for n in range(len(self.layers))]
        self.entries[slot].copy_(torch.tensor(rows, dtype=torch.int64))
        # Only now, when no later launch reads them, may the former ones go.
        self._forget(slot)
        for number, found in placed.items():
            self.layers[number][slot] = found

    def clear(self, slot: int) -> None:
        """Empty a slot: its rows are computed as the base's."""
        assert slot != BASE_SLOT, "the base has no factors"
        self.entries[slot].zero_()
        self._forget(slot)

    def layer(self, group: int, part: int) -> dict[int, SlotFactors]:
        """Give slot → factors of one linear of a group."""
        return self.layers[self.first[group] + part]

    def scratch(self, numbers: int) -> torch.Tensor:
        """Give memory for so many float32 numbers, the same for all batches: one is computed at a time.

        Who got less keeps what it got.
        """
        if self._scratch.numel() < numbers:
            self._scratch = torch.empty(numbers, dtype=torch.float32, device=self.entries.device)
        return self._scratch[:numbers]

    def _forget(self, slot: int) -> None:
        for layer in self.layers:
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


class Rows:
    """The rows of a batch: whose they are, and what the kernels make of it once for a forward."""

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
        """Make the buffers for N rows, all of them the base's; a CUDA graph holds their addresses.

        Args:
            table: whose slots they have.
            count: N.
            tuning: `Tuning.choose(N)` where not given.
            slots: a buffer to read them from (N,) int32, with what it holds; where not given, one is made.
            distinct: how many different slots they may have, the base's counted; where not given, any. With
                few slots and many rows there are far fewer tiles, and every one costs launches.
            kernels: whether the Triton kernels do it; where not given, if the table is on a GPU.
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
            from rayft.kernels.grouped_lora_plan import Plan

            self.plan = Plan(table, count, self.tuning, min(distinct or table.slots, table.slots))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.slots.nbytes + (self.plan.nbytes if self.plan else 0)

    def prepare(self) -> None:
        """Read `slots` and the table, on the device; before a forward, in its graph, after each change."""
        if self.plan:
            self.plan.prepare(self.slots)
        else:
            self.segments = segment_lora.segments(self.slots.tolist(), self.slots.device)


def grouped_lora(
    x_NI: torch.Tensor, ys: Sequence[torch.Tensor], rows: Rows, group: int, *, accumulate: bool = True
) -> None:
    """Add every row's adapter to the outputs of a group's linears, in place.

    Args:
        x_NI: their input.
        ys: their outputs (N × O), which may be views of a wider one.
        rows: the batch, prepared.
        group: index in the table's groups.
        accumulate: whether to add to y; else y is written, zeros where a row has no adapter.
    """
    known = rows.table.groups[group]
    assert x_NI.shape == (rows.count, known.inputs), "not the batch that was prepared"
    assert [tuple(y.shape) for y in ys] == [(rows.count, size) for size in known.outputs.values()]
    if rows.plan:
        rows.plan.add(x_NI, ys, group, accumulate=accumulate)
        return
    for part, y_NO in enumerate(ys):
        if not accumulate:
            y_NO.zero_()
        segment_lora.segment_lora(x_NI, y_NO, rows.segments, rows.table.layer(group, part))


def reference(
    x_NI: torch.Tensor, ys: Sequence[torch.Tensor], rows: Rows, group: int, *, accumulate: bool = True
) -> list[torch.Tensor]:
    """Compute what `grouped_lora` gives, row by row and in float64, into new tensors."""
    slots = rows.slots.tolist()
    return [
        segment_lora.reference(
            x_NI, y_NO if accumulate else torch.zeros_like(y_NO), slots, rows.table.layer(group, part)
        )
        for part, y_NO in enumerate(ys)
    ]


def place(b: torch.Tensor) -> torch.Tensor:
    """Give B (O × R), or a matrix whose columns are to be used as B, where the kernels can read it.

    Its rows must begin at multiples of 8 numbers, which are loaded at once. A copy has zeros from R to the
    next such multiple.
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
    """Make the numbers of an entry, see `FIELDS`."""
    a, b, columns = factors.a, factors.b, factors.columns
    (scale,) = struct.unpack("<i", struct.pack("<f", factors.scale))
    addresses = [0 if a is None else a.data_ptr(), b.data_ptr(), 0 if columns is None else columns.data_ptr()]
    return [*addresses, b.shape[1], b.stride(0), scale, 0, 0]

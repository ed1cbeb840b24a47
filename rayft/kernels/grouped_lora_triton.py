"""The Triton kernels of `rayft.kernels.grouped_lora`, which says what they compute.

A program waits for memory twice: for its tile's entry and rows, whose addresses follow from its number,
then for factors, x, h and y. Where launches may overlap, every program waits for the previous kernel
(`gdc_wait`) and only then lets the next one begin. So when `expand` reads entries and B before its wait,
`shrink` has already waited for everything before it. x, h and y are read and written after the wait.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl

from rayft.kernels.launch_triton import Launcher

__all__ = ["launch_describe", "launch_order", "launcher"]

# Sizes of the batch. No load's alignment depends on them, so no kernel is compiled for a value of theirs.
SIZES = ["n_rows", "n_tiles"]


@triton.jit(do_not_specialize=["n_rows"])
def order(slots_ptr, sorted_ptr, n_rows, n_slots, BN: tl.constexpr, BM: tl.constexpr):
    """Sort the rows by slot, the base's last: (row, slot, index in the slot, rows of the slot from it on)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mine = tl.load(slots_ptr + n, mask=n < n_rows, other=0)
    mine = tl.where((mine > 0) & (mine < n_slots), mine, n_slots)
    lower = tl.zeros((BN,), tl.int32)
    earlier = tl.zeros((BN,), tl.int32)
    same = tl.zeros((BN,), tl.int32)
    for start in range(0, n_rows, BM):
        m = start + tl.arange(0, BM)
        other = tl.load(slots_ptr + m, mask=m < n_rows, other=0)
        other = tl.where((other > 0) & (other < n_slots), other, n_slots)
        other = tl.where(m < n_rows, other, n_slots + 1)
        equal = other[None, :] == mine[:, None]
        lower += tl.sum((other[None, :] < mine[:, None]).to(tl.int32), 1)
        earlier += tl.sum((equal & (m[None, :] < n[:, None])).to(tl.int32), 1)
        same += tl.sum(equal.to(tl.int32), 1)
    place = sorted_ptr + (lower + earlier) * 4
    tl.store(place, n, mask=n < n_rows)
    tl.store(place + 1, tl.where(mine < n_slots, mine, 0), mask=n < n_rows)
    tl.store(place + 2, earlier, mask=n < n_rows)
    tl.store(place + 3, same - earlier, mask=n < n_rows)


@triton.jit(do_not_specialize=SIZES)
def describe(
    sorted_ptr, entries_ptr, tiles_ptr, rows_ptr, n_rows, n_tiles,
    FIELDS: tl.constexpr, T: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Divide the sorted rows into tiles, and copy one layer's entry for each, with first row and count."""
    layer, n_layers = tl.program_id(0), tl.num_programs(0)
    field = tl.arange(0, FIELDS)[None, :]
    found = tl.zeros((1,), tl.int32)
    for start in range(0, n_rows, BP):
        p = start + tl.arange(0, BP)
        inside = p < n_rows
        row = tl.load(sorted_ptr + p * 4, mask=inside, other=0)
        slot = tl.load(sorted_ptr + p * 4 + 1, mask=inside, other=0)
        index = tl.load(sorted_ptr + p * 4 + 2, mask=inside, other=1)
        left = tl.load(sorted_ptr + p * 4 + 3, mask=inside, other=0)
        leads = inside & (index % T == 0)
        tile = found + tl.cumsum(leads.to(tl.int32), 0) - 1
        if layer == 0:
            tl.store(rows_ptr + tile * T + index % T, row, mask=inside)
        entry = tl.load(
            entries_ptr + (slot * n_layers + layer)[:, None] * FIELDS + field, mask=leads[:, None], other=0
        )
        entry = tl.where(field == 6, p[:, None].to(tl.int64), entry)
        entry = tl.where(field == 7, tl.minimum(left, T)[:, None].to(tl.int64), entry)
        tl.store(tiles_ptr + (layer * n_tiles + tile)[:, None] * FIELDS + field, entry, mask=leads[:, None])
        found += tl.sum(leads.to(tl.int32), 0)
    for start in range(0, n_tiles, BP):
        t = start + tl.arange(0, BP)
        surplus = (t >= found) & (t < n_tiles)
        tl.store(
            tiles_ptr + (layer * n_tiles + t)[:, None] * FIELDS + field,
            tl.zeros((BP, FIELDS), tl.int64),
            mask=surplus[:, None],
        )


@triton.jit
def _follow(OVERLAP: tl.constexpr):
    """Wait for the previous kernel, then let the next one begin."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _read(tiles_ptr, rows_ptr, of, tile, n_tiles, FIELDS: tl.constexpr, T: tl.constexpr):
    """Read a tile's entry in one layer: its address, columns, rank, places in h, rows, and mask of rows."""
    entry = tiles_ptr + (of * n_tiles + tile) * FIELDS
    n = tl.arange(0, T)
    columns, rank = tl.load(entry + 2), tl.load(entry + 3).to(tl.int32)
    place, in_n = tl.load(entry + 6).to(tl.int32) + n, n < tl.load(entry + 7)
    return entry, columns, rank, place, tl.load(rows_ptr + tile * T + n).to(tl.int64), in_n


@triton.jit
def _shrink_ranks(
    x_row, in_n, a_ptr, columns, h_row, rank, start, begin, n_inputs,
    BR: tl.constexpr, T: tl.constexpr, BI: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute h of one tile for inputs begin … begin + CHUNK and ranks start … start + BR, or gather it."""
    r = start + tl.arange(0, BR)
    in_r = r < rank
    h = tl.zeros((T, BR), tl.float32)
    if columns == 0:
        i = tl.arange(0, BI)
        x_place, a_place = (
            x_row[:, None] + (begin + i)[None, :],
            (r * n_inputs)[:, None] + (begin + i)[None, :],
        )
        for step in range(0, CHUNK, BI):
            in_i = i < n_inputs - begin - step
            x = tl.load(x_place + step, mask=in_n[:, None] & in_i[None, :], other=0.0)
            a = tl.load(a_ptr + a_place + step, mask=in_r[:, None] & in_i[None, :], other=0.0)
            h = tl.dot(x, tl.trans(a), h, input_precision="ieee")
    else:
        column = tl.load(columns.to(tl.pointer_type(tl.int64)) + r, mask=in_r, other=0)
        chosen = tl.load(x_row[:, None] + column[None, :], mask=in_n[:, None] & in_r[None, :], other=0.0)
        h = chosen.to(tl.float32)
    tl.store(h_row[:, None] + r[None, :], h, mask=in_n[:, None])


@triton.jit(do_not_specialize=SIZES)
def shrink(
    x_ptr, tiles_ptr, rows_ptr, h_ptr, n_rows, n_inputs, x_stride, n_tiles,
    FIELDS: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr, T: tl.constexpr, BI: tl.constexpr,
    CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute one part of h for one tile and one linear; the first part gathers all selected inputs."""
    number, tile = tl.program_id(0), tl.program_id(1)
    of, part = number % SLICES, number // SLICES
    _follow(OVERLAP)
    entry, columns, rank, place, row, in_n = _read(tiles_ptr, rows_ptr, of, tile, n_tiles, FIELDS, T)
    a_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
    x_row = x_ptr + row * x_stride
    h_row = h_ptr + ((part * SLICES + of) * n_rows + place) * WIDTH
    begin = part * CHUNK
    # h is written in whole blocks of ranks, because `expand` reads whole blocks.
    if (columns == 0) | (part == 0):
        if rank > 32:
            for start in range(0, rank, 64):
                _shrink_ranks(
                    x_row, in_n, a_ptr, columns, h_row, rank, start, begin, n_inputs, 64, T, BI, CHUNK
                )
        elif rank > 16:
            _shrink_ranks(x_row, in_n, a_ptr, columns, h_row, rank, 0, begin, n_inputs, 32, T, BI, CHUNK)
        elif rank > 0:
            _shrink_ranks(x_row, in_n, a_ptr, columns, h_row, rank, 0, begin, n_inputs, 16, T, BI, CHUNK)


@triton.jit
def _load_b(b_ptr, b_stride, o, in_o, rank, start, BR: tl.constexpr):
    """Load columns start … start + BR of some rows of B, with zeros from the rank on."""
    r = start + tl.arange(0, BR)
    # Whole vectors are loaded (see `place`). In a view of a wider matrix, the rest is not this adapter's.
    loaded = r < (rank + 7) // 8 * 8
    b = tl.load(b_ptr + o[:, None] * b_stride + r[None, :], mask=in_o[:, None] & loaded[None, :], other=0.0)
    return tl.where((r < rank)[None, :], b, 0.0)


@triton.jit
def _load_h(
    h_ptr, h_row, in_n, part_stride, parts, start, BR: tl.constexpr, BP: tl.constexpr, LOOP: tl.constexpr
):
    """Load the parts of h and add them up; h is written in whole blocks of ranks."""
    if LOOP and BP > 2:
        # So many parts of a large tile don't fit into the registers at once.
        one = h_row[:, None] + (start + tl.arange(0, BR))[None, :]
        h = tl.load(h_ptr + one, mask=in_n[:, None], other=0.0)
        for part in tl.static_range(1, BP):
            h += tl.load(h_ptr + part * part_stride + one, mask=in_n[:, None] & (part < parts), other=0.0)
        return h
    # In one load: with single loads in a loop, each would wait for the one before it.
    part = tl.arange(0, BP)[:, None, None]
    place = part * part_stride + (h_row[:, None] + (start + tl.arange(0, BR))[None, :])[None, :, :]
    return tl.sum(tl.load(h_ptr + place, mask=in_n[None, :, None] & (part < parts), other=0.0), 0)


@triton.jit
def _expand_ranks(
    y_place, in_n, n_outputs, b_ptr, b_stride, o, h_ptr, h_row, part_stride, parts, rank, scale, end,
    BR: tl.constexpr, LAST: tl.constexpr, BO: tl.constexpr, SPAN: tl.constexpr, BP: tl.constexpr,
    OVERLAP: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Compute one tile and SPAN outputs, BO outputs and BR ranks at once."""
    kind = b_ptr.dtype.element_ty
    if SPAN == BO:
        in_o = o < n_outputs
        mask = in_n[:, None] & in_o[None, :]
        b = _load_b(b_ptr, b_stride, o, in_o, rank, 0, BR)
        _follow(OVERLAP)
        if ADD:
            before = tl.load(y_place, mask=mask, other=0.0)
        h = _load_h(h_ptr, h_row, in_n, part_stride, parts, 0, BR, BP, SPAN > BO)
        total = tl.dot(h.to(kind), tl.trans(b), input_precision="ieee")
        if LAST:
            # Buffers for several reads here would leave room for fewer programs, also where ranks are small.
            for start in tl.range(BR, rank, BR, num_stages=1):
                more = _load_b(b_ptr, b_stride, o, in_o, rank, start, BR)
                h = _load_h(h_ptr, h_row, in_n, part_stride, parts, start, BR, BP, SPAN > BO)
                total = tl.dot(h.to(kind), tl.trans(more), total, input_precision="ieee")
        total *= scale
        if ADD:
            total += before.to(tl.float32)
        tl.store(y_place, total.to(y_place.dtype.element_ty), mask=mask)
    else:
        _follow(OVERLAP)
        h = _load_h(h_ptr, h_row, in_n, part_stride, parts, 0, BR, BP, SPAN > BO).to(kind)
        for step in range(0, end, BO):
            in_o = o + step < n_outputs
            mask = in_n[:, None] & in_o[None, :]
            b = _load_b(b_ptr, b_stride, o + step, in_o, rank, 0, BR)
            total = tl.dot(h, tl.trans(b), input_precision="ieee")
            if LAST:
                for start in tl.range(BR, rank, BR, num_stages=1):
                    more = _load_b(b_ptr, b_stride, o + step, in_o, rank, start, BR)
                    rest = _load_h(h_ptr, h_row, in_n, part_stride, parts, start, BR, BP, SPAN > BO)
                    total = tl.dot(rest.to(kind), tl.trans(more), total, input_precision="ieee")
            total *= scale
            if ADD:
                total += tl.load(y_place + step, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_place + step, total.to(y_place.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def expand(  # noqa: C901, PLR0912, PLR0915  (a branch for each output and kind of rank)
    y0_ptr, y1_ptr, y2_ptr, y3_ptr, tiles_ptr, rows_ptr, h_ptr,
    n_rows, outputs_0, outputs_1, outputs_2, outputs_3, y0_stride, y1_stride, y2_stride, y3_stride, n_tiles,
    FIELDS: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr, T: tl.constexpr, BO: tl.constexpr,
    SPAN: tl.constexpr, BR: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, OVERLAP: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Compute one tile and SPAN outputs; programs are numbered through the linears of the group."""
    block, tile = tl.program_id(0), tl.program_id(1)
    of = block * 0
    y_ptr, y_stride, n_outputs = y0_ptr, y0_stride, outputs_0
    if SLICES > 1:
        blocks = tl.cdiv(outputs_0, SPAN)
        if block >= blocks:
            block, of = block - blocks, of + 1
            y_ptr, y_stride, n_outputs = y1_ptr, y1_stride, outputs_1
            if SLICES > 2:
                blocks = tl.cdiv(outputs_1, SPAN)
                if block >= blocks:
                    block, of = block - blocks, of + 1
                    y_ptr, y_stride, n_outputs = y2_ptr, y2_stride, outputs_2
                    if SLICES > 3:
                        blocks = tl.cdiv(outputs_2, SPAN)
                        if block >= blocks:
                            block, of = block - blocks, of + 1
                            y_ptr, y_stride, n_outputs = y3_ptr, y3_stride, outputs_3
    entry, columns, rank, place, row, in_n = _read(tiles_ptr, rows_ptr, of, tile, n_tiles, FIELDS, T)
    b_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(y_ptr.dtype.element_ty)), 16)
    b_stride = tl.multiple_of(tl.load(entry + 4).to(tl.int32), 8)
    scale = tl.load(entry + 5).to(tl.int32).to(tl.float32, bitcast=True)
    o = block * SPAN + tl.arange(0, BO)
    y_place = y_ptr + (row * y_stride)[:, None] + o[None, :]
    h_row, part_stride = (of * n_rows + place) * WIDTH, n_rows * SLICES * WIDTH
    parts = tl.where(columns == 0, PARTS, 1)
    end = tl.minimum(SPAN, n_outputs - block * SPAN)
    if rank == 0:
        _follow(OVERLAP)
        if not ADD:
            for step in range(0, end, BO):
                mask = in_n[:, None] & (o + step < n_outputs)[None, :]
                tl.store(y_place + step, tl.zeros((T, BO), y_ptr.dtype.element_ty), mask=mask)
    elif rank <= 16:
        _expand_ranks(
            y_place, in_n, n_outputs, b_ptr, b_stride, o, h_ptr, h_row, part_stride, parts, rank, scale, end,
            16, False, BO, SPAN, BP, OVERLAP, ADD,
        )  # fmt: skip
    elif rank <= 32:
        _expand_ranks(
            y_place, in_n, n_outputs, b_ptr, b_stride, o, h_ptr, h_row, part_stride, parts, rank, scale, end,
            32, False, BO, SPAN, BP, OVERLAP, ADD,
        )  # fmt: skip
    elif rank <= BR:
        _expand_ranks(
            y_place, in_n, n_outputs, b_ptr, b_stride, o, h_ptr, h_row, part_stride, parts, rank, scale, end,
            BR, False, BO, SPAN, BP, OVERLAP, ADD,
        )  # fmt: skip
    else:
        _expand_ranks(
            y_place, in_n, n_outputs, b_ptr, b_stride, o, h_ptr, h_row, part_stride, parts, rank, scale, end,
            BR, True, BO, SPAN, BP, OVERLAP, ADD,
        )  # fmt: skip


launch_order = Launcher(order, num_warps=4)
launch_describe = Launcher(describe, num_warps=4)


@lru_cache(maxsize=64)
def launcher(kernel: str, warps: int, stages: int, registers: int, overlap: bool) -> Launcher:
    """Return the launcher of `shrink` or `expand` for some launch options."""
    options = ({"launch_pdl": True} if overlap else {}) | ({"maxnreg": registers} if registers else {})
    return Launcher(
        {"shrink": shrink, "expand": expand}[kernel], num_warps=warps, num_stages=stages, **options
    )

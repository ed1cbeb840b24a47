"""The Triton kernel that does a tile's shrink and expand in one launch; see `rayft.kernels.grouped_lora`.

h stays on the chip, x is read once, y written once, and the launch before it is waited for once. Ranks
beyond 64 are the exception: their further blocks of h go through memory, by the same program. It is meant for
a prefill, whose tiles fill the device: a tile's inputs and outputs are gone through by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rayft.kernels.grouped_lora_triton import follow, load_b, read, shrink_ranks, times_a

__all__ = ["fused"]


@triton.jit
def _fused_ranks(
    x_row, y_row, in_n, a_ptr, b_ptr, b_stride, columns, h_row, rank, scale, n_inputs, first, end,
    BR: tl.constexpr, LAST: tl.constexpr, T: tl.constexpr, BI: tl.constexpr, INPUTS: tl.constexpr,
    BO: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One tile: its h, then outputs first … end. What is beyond BR ranks goes through h_row."""
    kind = b_ptr.dtype.element_ty
    low = times_a(x_row, in_n, a_ptr, columns, rank, 0, 0, n_inputs, BR, T, BI, INPUTS).to(kind)
    if LAST:
        for start in range(BR, rank, BR):
            shrink_ranks(x_row, in_n, a_ptr, columns, h_row, rank, start, 0, n_inputs, BR, T, BI, INPUTS)
        tl.debug_barrier()
    for block in range(first, end, BO):
        o = block + tl.arange(0, BO)
        in_o = o < end
        mask = in_n[:, None] & in_o[None, :]
        b = load_b(b_ptr, b_stride, o, in_o, rank, 0, BR)
        total = tl.dot(low, tl.trans(b), input_precision="ieee")
        if LAST:
            for start in range(BR, rank, BR):
                more = load_b(b_ptr, b_stride, o, in_o, rank, start, BR)
                place = h_row[:, None] + (start + tl.arange(0, BR))[None, :]
                h = tl.load(place, mask=in_n[:, None], other=0.0).to(kind)
                total = tl.dot(h, tl.trans(more), total, input_precision="ieee")
        total *= scale
        y_place = y_row[:, None] + o[None, :]
        if ADD:
            total += tl.load(y_place, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_place, total.to(y_row.dtype.element_ty), mask=mask)


@triton.jit
def fused(
    x_ptr, y0_ptr, y1_ptr, y2_ptr, tiles_ptr, rows_ptr, h_ptr,
    n_rows, n_inputs, outputs_0, outputs_1, outputs_2, x_stride, y0_stride, y1_stride, y2_stride, n_tiles,
    FIELDS: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr, T: tl.constexpr, BI: tl.constexpr,
    INPUTS: tl.constexpr, BO: tl.constexpr, SPLIT: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile, one linear, one part of the outputs: h, and what it adds to y, in one go."""
    number, tile = tl.program_id(0), tl.program_id(1)
    of, part = number % SLICES, number // SLICES
    y_ptr, y_stride, n_outputs = y0_ptr, y0_stride, outputs_0
    if of == 1:
        y_ptr, y_stride, n_outputs = y1_ptr, y1_stride, outputs_1
    if of == 2:
        y_ptr, y_stride, n_outputs = y2_ptr, y2_stride, outputs_2
    follow(OVERLAP)
    entry, columns, rank, place, row, in_n = read(tiles_ptr, rows_ptr, of, tile, n_tiles, FIELDS, T)
    a_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
    b_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
    b_stride = tl.multiple_of(tl.load(entry + 4).to(tl.int32), 8)
    scale = tl.load(entry + 5).to(tl.int32).to(tl.float32, bitcast=True)
    share = tl.cdiv(tl.cdiv(n_outputs, BO), SPLIT) * BO
    first = part * share
    end = tl.minimum(first + share, n_outputs)
    x_row, y_row = x_ptr + row * x_stride, y_ptr + row * y_stride
    h_row = h_ptr + ((part * SLICES + of) * n_rows + place) * WIDTH
    if rank == 0:
        if not ADD:
            for block in range(first, end, BO):
                o = block + tl.arange(0, BO)
                mask = in_n[:, None] & (o < end)[None, :]
                tl.store(y_row[:, None] + o[None, :], tl.zeros((T, BO), y_ptr.dtype.element_ty), mask=mask)
    elif rank <= 16:
        _fused_ranks(
            x_row, y_row, in_n, a_ptr, b_ptr, b_stride, columns, h_row, rank, scale, n_inputs, first, end,
            16, False, T, BI, INPUTS, BO, ADD,
        )  # fmt: skip
    elif rank <= 32:
        _fused_ranks(
            x_row, y_row, in_n, a_ptr, b_ptr, b_stride, columns, h_row, rank, scale, n_inputs, first, end,
            32, False, T, BI, INPUTS, BO, ADD,
        )  # fmt: skip
    else:
        _fused_ranks(
            x_row, y_row, in_n, a_ptr, b_ptr, b_stride, columns, h_row, rank, scale, n_inputs, first, end,
            64, True, T, BI, INPUTS, BO, ADD,
        )  # fmt: skip

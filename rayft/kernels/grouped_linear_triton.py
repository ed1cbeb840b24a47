"""The Triton kernels of `rayft.kernels.grouped_linear`, which says what they compute.

`rayft.kernels.grouped_linear_table` says how the work is divided. Sums over tiles of outputs, and over parts,
are written and added up in a fixed order.

Most strips have one chunk, or two in a chain: h and q stay in registers while the strip's outputs are
computed. Where there are more, they are written and read again for each tile of outputs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from rayft.kernels import grouped_linear_table
from rayft.kernels.grouped_linear_table import Table
from rayft.kernels.launch_triton import Launcher, aligned

__all__ = ["backward", "forward"]

TILE = 128
"""Inputs or outputs of a strip that a program computes at once."""
SUMMED = 2048
"""Numbers of db that a program adds up at once."""
CHUNK = tl.constexpr(grouped_linear_table.CHUNK)
STRIP = tl.constexpr(grouped_linear_table.STRIP)
FIRST = tl.constexpr(grouped_linear_table.STRIP - grouped_linear_table.CHUNK)
OF_PART = tl.constexpr(grouped_linear_table.PART - grouped_linear_table.CHUNK)
PART = tl.constexpr(grouped_linear_table.PART)
TRAINS_B = tl.constexpr(grouped_linear_table.TRAINS_B)
TRAINS_A = tl.constexpr(grouped_linear_table.TRAINS_A)
PARTS_OF_A = 4
"""Parts of a chunk's rows, each of which a program multiplies for da."""
ABSENT, WRITE, ADD = 0, 1, 2
"""What `_total` does to grad_x: it is not needed; it is written; it is added to."""

# Only sizes of the layer are specialised on, of which divisibility by 16 matters.
OF_BATCH = ["chunks_at", "list_at", "strips", "blocks", "split"]


@triton.jit
def _address(entry, kind: tl.constexpr):
    """Read an address that is a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(kind)), 16)


@triton.jit
def _place(ptr, entry):
    """Return where a chunk's h, q or sums begin."""
    return ptr + tl.multiple_of(tl.load(entry), 8)


@triton.jit
def _width(rank):
    """Return how far apart the rows of h and q are: ranks up to a multiple of 8, so that loads are wide."""
    return (rank + 7) // 8 * 8


@triton.jit
def _rank(chunk):
    return tl.load(chunk + 3).to(tl.int32)


@triton.jit
def _stride(chunk):
    return tl.load(chunk + 4).to(tl.int32)


@triton.jit
def _scale(chunk):
    return tl.load(chunk + 5).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _local(chunk, begin, n):
    """Return which rows of a chunk the rows from `begin` on are."""
    return begin - tl.load(chunk + 6).to(tl.int32) + n


@triton.jit
def _has(chunk, flag: tl.constexpr):
    return (tl.load(chunk + 9).to(tl.int32) & flag) > 0


@triton.jit
def _b(b_ptr, stride, o, in_o, rank, R: tl.constexpr):
    """Load B of a chunk for some outputs."""
    r = tl.arange(0, R)
    place = b_ptr + o[:, None] * stride + r[None, :]
    return tl.load(place, mask=in_o[:, None] & (r < rank)[None, :], other=0.0)


@triton.jit
def _b_of(chunk, o, in_o, kind: tl.constexpr, R: tl.constexpr):
    """Load B of a chunk for some outputs; where its rows begin at multiples of 4 numbers, by 4."""
    b_ptr, stride, rank = _address(chunk, kind), _stride(chunk), _rank(chunk)
    if (stride % 4) == 0:
        b = _b(b_ptr, stride // 4 * 4, o, in_o, rank // 4 * 4, R)
    else:
        b = _b(b_ptr, stride, o, in_o, rank, R)
    return b


@triton.jit
def _a(a_ptr, i, n_inputs, rank, R: tl.constexpr):
    """Load A of a chunk for some inputs."""
    r = tl.arange(0, R)
    place = a_ptr + r[:, None] * n_inputs + i[None, :]
    return tl.load(place, mask=(r < rank)[:, None] & (i < n_inputs)[None, :], other=0.0)


@triton.jit
def _columns(chunk, other: tl.constexpr, R: tl.constexpr):
    """Load the inputs that a chunk selects."""
    r, columns = tl.arange(0, R), tl.load(chunk + 2).to(tl.pointer_type(tl.int64))
    return tl.load(columns + r, mask=r < _rank(chunk), other=other).to(tl.int32)


@triton.jit
def _selector(column, i, kind: tl.constexpr):
    """Return the matrix for some inputs that selects columns."""
    return tl.where(column[:, None] == i[None, :], 1.0, 0.0).to(kind)


@triton.jit
def _inner(x_ptr, row, in_n, chunk, n_inputs, x_stride, R: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr):
    """Compute h of one strip and chunk, in x's dtype, with zeros from the rank on."""
    rank = _rank(chunk)
    in_r = tl.arange(0, R) < rank
    h = tl.zeros((BN, R), tl.float32)
    if tl.load(chunk + 2) == 0:
        a_ptr = _address(chunk + 1, x_ptr.dtype.element_ty)
        for start in range(0, n_inputs, BI):
            i = start + tl.arange(0, BI)
            place = x_ptr + row[:, None] * x_stride + i[None, :]
            x = tl.load(place, mask=in_n[:, None] & (i < n_inputs)[None, :], other=0.0)
            h += tl.dot(x, tl.trans(_a(a_ptr, i, n_inputs, rank, R)))
    else:
        place = x_ptr + row[:, None] * x_stride + _columns(chunk, 0, R)[None, :]
        h += tl.load(place, mask=in_n[:, None] & in_r[None, :], other=0.0).to(tl.float32)
    # An infinite input times the padding of A is NaN.
    return tl.where(in_r[None, :], h, 0.0).to(x_ptr.dtype.element_ty)


@triton.jit
def _store_rows(ptr, chunk, local, values, in_n, R: tl.constexpr):
    """Store rows of h or q of a chunk; columns beyond the rank, up to a multiple of 8, are zeros."""
    r, width = tl.arange(0, R), _width(_rank(chunk))
    tl.store(ptr + local[:, None] * width + r[None, :], values, mask=in_n[:, None] & (r < width)[None, :])


@triton.jit
def _load_rows(ptr, local, rank, in_n, R: tl.constexpr):
    """Load rows of h or q of a chunk."""
    r, width = tl.arange(0, R), _width(rank)
    place = ptr + local[:, None] * width + r[None, :]
    return tl.load(place, mask=in_n[:, None] & (r < width)[None, :], other=0.0)


@triton.jit
def _write_y(
    y_ptr, bias_ptr, h, b_ptr, stride, rank, scale, h_2, b_2_ptr, stride_2, rank_2, scale_2,
    row, in_n, n_outputs, first, blocks, R: tl.constexpr, BO: tl.constexpr, BIAS: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """Write `blocks` tiles of y for a strip with one or two chunks."""
    for number in range(first, first + blocks):
        o = number * BO + tl.arange(0, BO)
        in_o = o < n_outputs
        y = tl.dot(h, tl.trans(_b(b_ptr, stride, o, in_o, rank, R))) * scale
        if TWO:
            y += tl.dot(h_2, tl.trans(_b(b_2_ptr, stride_2, o, in_o, rank_2, R))) * scale_2
        if BIAS:
            y += tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
        place = y_ptr + row[:, None] * n_outputs + o[None, :]
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=in_n[:, None] & in_o[None, :])


@triton.jit
def _in_registers(
    x_ptr, bias_ptr, chunk, other, h_ptr, y_ptr, begin, row, in_n, n_inputs, n_outputs, x_stride,
    first, blocks, R: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    BIAS: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Compute h, then `blocks` tiles of y, of a strip with one chunk, or with two."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.arange(0, BN)
    h = _inner(x_ptr, row, in_n, chunk, n_inputs, x_stride, R, BN, BI)
    saved = in_n & (first == 0) & _has(chunk, TRAINS_B)
    _store_rows(_place(h_ptr, chunk + 15), chunk, _local(chunk, begin, n), h, saved, R)
    h_2 = h
    if TWO:
        h_2 = _inner(x_ptr, row, in_n, other, n_inputs, x_stride, R, BN, BI)
        saved = in_n & (first == 0) & _has(other, TRAINS_B)
        _store_rows(_place(h_ptr, other + 15), other, _local(other, begin, n), h_2, saved, R)
    b_ptr, stride, rank, scale = _address(chunk, kind), _stride(chunk), _rank(chunk), _scale(chunk)
    b_2_ptr, stride_2, rank_2, scale_2 = _address(other, kind), _stride(other), _rank(other), _scale(other)
    # Where rows of B begin at multiples of 4 numbers, 4 are loaded at once.
    if ((stride % 4) == 0) & ((stride_2 % 4) == 0):
        _write_y(
            y_ptr, bias_ptr, h, b_ptr, stride // 4 * 4, rank // 4 * 4, scale,
            h_2, b_2_ptr, stride_2 // 4 * 4, rank_2 // 4 * 4, scale_2,
            row, in_n, n_outputs, first, blocks, R, BO, BIAS, TWO,
        )  # fmt: skip
    else:
        _write_y(
            y_ptr, bias_ptr, h, b_ptr, stride, rank, scale, h_2, b_2_ptr, stride_2, rank_2, scale_2,
            row, in_n, n_outputs, first, blocks, R, BO, BIAS, TWO,
        )  # fmt: skip


@triton.jit
def _in_memory(
    x_ptr, bias_ptr, chunks, count, h_ptr, frozen_ptr, y_ptr, begin, row, in_n, n_inputs, n_outputs, x_stride,
    first, blocks, R: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    BIAS: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """Compute h, then `blocks` tiles of y, of a strip with any number of chunks, or of none."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.arange(0, BN)
    if SEVERAL:
        for c in range(0, count):
            chunk = chunks + c * CHUNK
            h = _inner(x_ptr, row, in_n, chunk, n_inputs, x_stride, R, BN, BI)
            local, trained = _local(chunk, begin, n), _has(chunk, TRAINS_B)
            # Programs of the same strip write the same numbers.
            _store_rows(_place(h_ptr, chunk + 15), chunk, local, h, in_n & trained, R)
            _store_rows(_place(frozen_ptr, chunk + 15), chunk, local, h, in_n & (trained == 0), R)
        tl.debug_barrier()
    for number in range(first, first + blocks):
        o = number * BO + tl.arange(0, BO)
        in_o = o < n_outputs
        y = tl.zeros((BN, BO), tl.float32)
        if SEVERAL:
            for c in range(0, count):
                chunk = chunks + c * CHUNK
                source = h_ptr
                if _has(chunk, TRAINS_B) == 0:
                    source = frozen_ptr
                place = _place(source, chunk + 15)
                h = _load_rows(place, _local(chunk, begin, n), _rank(chunk), in_n, R)
                y += tl.dot(h, tl.trans(_b_of(chunk, o, in_o, kind, R))) * _scale(chunk)
        if BIAS:
            y += tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
        out = y_ptr + row[:, None] * n_outputs + o[None, :]
        tl.store(out, y.to(kind), mask=in_n[:, None] & in_o[None, :])


@triton.jit(do_not_specialize=OF_BATCH)
def _update(
    x_ptr, bias_ptr, table_ptr, h_ptr, frozen_ptr, y_ptr,
    n_inputs, n_outputs, x_stride, chunks_at, strips, blocks,
    R: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BIAS: tl.constexpr,
    SEVERAL: tl.constexpr,
):  # fmt: skip
    """Compute h of a strip's chunks, then `blocks` tiles of its outputs."""
    block = tl.program_id(0)
    first = block // strips * blocks
    strip = table_ptr + block % strips * STRIP
    begin, count = tl.load(strip).to(tl.int32), tl.load(strip + 3).to(tl.int32)
    n = tl.arange(0, BN)
    in_n = n < tl.load(strip + 1)
    row = (begin + n).to(tl.int64)
    one, chunks = strip + FIRST, table_ptr + chunks_at + tl.load(strip + 2) * CHUNK
    if count == 1:
        _in_registers(
            x_ptr, bias_ptr, one, one, h_ptr, y_ptr, begin, row, in_n, n_inputs, n_outputs, x_stride,
            first, blocks, R, BN, BI, BO, BIAS, False,
        )  # fmt: skip
    elif SEVERAL:
        if count == 2:
            _in_registers(
                x_ptr, bias_ptr, one, chunks + CHUNK, h_ptr, y_ptr, begin, row, in_n, n_inputs, n_outputs,
                x_stride, first, blocks, R, BN, BI, BO, BIAS, True,
            )  # fmt: skip
        else:
            _in_memory(
                x_ptr, bias_ptr, chunks, count, h_ptr, frozen_ptr, y_ptr, begin, row, in_n, n_inputs,
                n_outputs, x_stride, first, blocks, R, BN, BI, BO, BIAS, True,
            )  # fmt: skip
    else:
        _in_memory(
            x_ptr, bias_ptr, chunks, count, h_ptr, frozen_ptr, y_ptr, begin, row, in_n, n_inputs, n_outputs,
            x_stride, first, blocks, R, BN, BI, BO, BIAS, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=OF_BATCH)
def _partial(
    g_ptr, table_ptr, h_ptr, sums_ptr, n_outputs, g_stride, list_at,
    R: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Compute q of one tile of outputs, and db of one part of a chunk's rows."""
    tile = tl.program_id(0)
    part = table_ptr + list_at + tl.program_id(1) * PART
    chunk = part + OF_PART
    begin, rows = tl.load(part).to(tl.int32), tl.load(part + 1).to(tl.int32)
    rank, trains = _rank(chunk), _has(chunk, TRAINS_B)
    o, r = tile * BO + tl.arange(0, BO), tl.arange(0, R)
    in_o = o < n_outputs
    b = _b_of(chunk, o, in_o, g_ptr.dtype.element_ty, R)
    db = tl.zeros((R, BO), tl.float32)
    before = _local(chunk, begin, 0)
    h_place, q_place = _place(h_ptr, chunk + 15), _place(sums_ptr, chunk + 10)
    q_place += tile * tl.load(chunk + 7) * _width(rank)
    for start in range(0, rows, BN):
        n = start + tl.arange(0, BN)
        in_n = n < rows
        row = (begin + n).to(tl.int64)
        place = g_ptr + row[:, None] * g_stride + o[None, :]
        g = tl.load(place, mask=in_n[:, None] & in_o[None, :], other=0.0)
        h = _load_rows(h_place, before + n, rank, in_n & trains, R)
        _store_rows(q_place, chunk, before + n, tl.dot(g, b), in_n, R)
        db += tl.dot(tl.trans(h), g)
    index = tl.load(part + 2) * rank + r
    place = _place(sums_ptr, chunk + 11) + index[:, None] * n_outputs + o[None, :]
    tl.store(place, db, mask=(r < rank)[:, None] & in_o[None, :] & trains)


@triton.jit
def _q(sums_ptr, chunk, local, in_n, R: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr):
    """Add up q of a strip and a chunk."""
    rank, rows, place = _rank(chunk), tl.load(chunk + 7), _place(sums_ptr, chunk + 10)
    q = tl.zeros((BN, R), tl.float32)
    for tile in tl.static_range(TILES):
        q += _load_rows(place + tile * rows * _width(rank), local, rank, in_n, R)
    return q * _scale(chunk)


@triton.jit
def _write_x(
    x_ptr, row, in_n, low, chunk, low_2, other, n_inputs, x_stride, first, blocks,
    R: tl.constexpr, BI: tl.constexpr, TO_X: tl.constexpr, SELECT: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Compute `blocks` tiles of grad_x for a strip with one or two chunks, which select inputs or have A."""
    rank, rank_2 = _rank(chunk), _rank(other)
    if SELECT:
        column, column_2 = _columns(chunk, -1, R), _columns(other, -1, R)
    else:
        a_ptr, a_2_ptr = _address(chunk + 1, low.dtype), _address(other + 1, low.dtype)
    for number in range(first, first + blocks):
        i = number * BI + tl.arange(0, BI)
        out, mask = x_ptr + row[:, None] * x_stride + i[None, :], in_n[:, None] & (i < n_inputs)[None, :]
        a = _selector(column, i, low.dtype) if SELECT else _a(a_ptr, i, n_inputs, rank, R)
        added = tl.dot(low, a)
        if TWO:
            a_2 = _selector(column_2, i, low.dtype) if SELECT else _a(a_2_ptr, i, n_inputs, rank_2, R)
            added += tl.dot(low_2, a_2)
        if TO_X == 2:
            added += tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, added.to(low.dtype), mask=mask)


@triton.jit
def _q_to_registers(
    sums_ptr, q_ptr, chunk, begin, in_n, first, kind: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Add up q of a strip and a chunk, and store it where A trains."""
    local = _local(chunk, begin, tl.arange(0, BN))
    low = _q(sums_ptr, chunk, local, in_n, R, BN, TILES).to(kind)
    saved = in_n & (first == 0) & _has(chunk, TRAINS_A)
    _store_rows(_place(q_ptr, chunk + 8), chunk, local, low, saved, R)
    return low


@triton.jit
def _q_to_memory(
    sums_ptr, q_ptr, x_ptr, chunks, count, begin, row, in_n, n_inputs, x_stride, first, blocks,
    R: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, TILES: tl.constexpr, TO_X: tl.constexpr,
    SEVERAL: tl.constexpr,
):  # fmt: skip
    """Add up q, then compute `blocks` tiles of grad_x, for a strip with any number of chunks, or none."""
    kind: tl.constexpr = q_ptr.dtype.element_ty
    n = tl.arange(0, BN)
    if SEVERAL:
        for c in range(0, count):
            chunk = chunks + c * CHUNK
            local = _local(chunk, begin, n)
            low = _q(sums_ptr, chunk, local, in_n, R, BN, TILES).to(kind)
            # Programs of the same strip write the same numbers.
            _store_rows(_place(q_ptr, chunk + 8), chunk, local, low, in_n, R)
        tl.debug_barrier()
    if TO_X > 0:
        for number in range(first, first + blocks):
            i = number * BI + tl.arange(0, BI)
            out, mask = x_ptr + row[:, None] * x_stride + i[None, :], in_n[:, None] & (i < n_inputs)[None, :]
            added = tl.zeros((BN, BI), tl.float32)
            if TO_X == 2:
                added += tl.load(out, mask=mask, other=0.0).to(tl.float32)
            if SEVERAL:
                for c in range(0, count):
                    chunk = chunks + c * CHUNK
                    rank, local = _rank(chunk), _local(chunk, begin, n)
                    low = _load_rows(_place(q_ptr, chunk + 8), local, rank, in_n, R)
                    if tl.load(chunk + 2) == 0:
                        a = _a(_address(chunk + 1, kind), i, n_inputs, rank, R)
                    else:
                        a = _selector(_columns(chunk, -1, R), i, kind)
                    added += tl.dot(low, a)
            tl.store(out, added.to(kind), mask=mask)


@triton.jit
def _into_columns(
    sums_ptr, x_ptr, chunks, count, begin, row, in_n, x_stride, kind: tl.constexpr,
    R: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Add q of all chunks of a strip into the columns that they select."""
    r = tl.arange(0, R)
    # Not pipelined: the next chunk may select the same columns.
    for c in tl.range(0, count, num_stages=1):
        chunk = chunks + c * CHUNK
        q = _q(sums_ptr, chunk, _local(chunk, begin, tl.arange(0, BN)), in_n, R, BN, TILES)
        out = x_ptr + row[:, None] * x_stride + _columns(chunk, 0, R)[None, :]
        mask = in_n[:, None] & (r < _rank(chunk))[None, :]
        q += tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, q.to(kind), mask=mask)
        tl.debug_barrier()


@triton.jit(do_not_specialize=OF_BATCH)
def _total(  # noqa: C901, PLR0912, PLR0915  (a branch for each kind of strip)
    sums_ptr, table_ptr, q_ptr, x_ptr, grads_ptr,
    n_inputs, n_outputs, x_stride, chunks_at, list_at, strips, blocks, split,
    TILES: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    TO_X: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """Add up q, by `split` programs for a strip with `blocks` tiles of grad_x each, and then db."""
    kind: tl.constexpr = q_ptr.dtype.element_ty
    block = tl.program_id(0)
    if block < strips * split:
        first = block // strips * blocks
        strip = table_ptr + block % strips * STRIP
        begin, count = tl.load(strip).to(tl.int32), tl.load(strip + 3).to(tl.int32)
        n = tl.arange(0, BN)
        in_n = n < tl.load(strip + 1)
        row = (begin + n).to(tl.int64)
        one, chunks = strip + FIRST, table_ptr + chunks_at + tl.load(strip + 2) * CHUNK
        if (TO_X == 2) & (tl.load(strip + 4) != 0):
            if first == 0:
                _into_columns(sums_ptr, x_ptr, chunks, count, begin, row, in_n, x_stride, kind, R, BN, TILES)
        elif count == 1:
            low = _q_to_registers(sums_ptr, q_ptr, one, begin, in_n, first, kind, R, BN, TILES)
            if TO_X > 0:
                if tl.load(one + 2) == 0:
                    _write_x(
                        x_ptr, row, in_n, low, one, low, one, n_inputs, x_stride, first, blocks,
                        R, BI, TO_X, False, False,
                    )  # fmt: skip
                else:
                    _write_x(
                        x_ptr, row, in_n, low, one, low, one, n_inputs, x_stride, first, blocks,
                        R, BI, TO_X, True, False,
                    )  # fmt: skip
        elif SEVERAL:
            other = chunks + CHUNK
            # Links of one chain either all select inputs or all have A.
            alike = (count == 2) & ((tl.load(one + 2) == 0) == (tl.load(other + 2) == 0))
            if alike:
                low = _q_to_registers(sums_ptr, q_ptr, one, begin, in_n, first, kind, R, BN, TILES)
                low_2 = _q_to_registers(sums_ptr, q_ptr, other, begin, in_n, first, kind, R, BN, TILES)
                if TO_X > 0:
                    if tl.load(one + 2) == 0:
                        _write_x(
                            x_ptr, row, in_n, low, one, low_2, other, n_inputs, x_stride, first, blocks,
                            R, BI, TO_X, False, True,
                        )  # fmt: skip
                    else:
                        _write_x(
                            x_ptr, row, in_n, low, one, low_2, other, n_inputs, x_stride, first, blocks,
                            R, BI, TO_X, True, True,
                        )  # fmt: skip
            else:
                _q_to_memory(
                    sums_ptr, q_ptr, x_ptr, chunks, count, begin, row, in_n, n_inputs, x_stride,
                    first, blocks, R, BN, BI, TILES, TO_X, True,
                )  # fmt: skip
        else:
            _q_to_memory(
                sums_ptr, q_ptr, x_ptr, chunks, count, begin, row, in_n, n_inputs, x_stride, first, blocks,
                R, BN, BI, TILES, TO_X, False,
            )  # fmt: skip
    else:
        tiles = tl.cdiv(n_outputs, BO)
        number = block - strips * split
        chunk = table_ptr + list_at + number // tiles * CHUNK
        o, r = number % tiles * BO + tl.arange(0, BO), tl.arange(0, R)
        rank, parts = _rank(chunk), tl.load(chunk + 12).to(tl.int32)
        mask = (o < n_outputs)[:, None] & (r < rank)[None, :]
        place, within = _place(sums_ptr, chunk + 11), r[None, :] * n_outputs + o[:, None]
        apart = rank.to(tl.int64) * n_outputs
        db = tl.zeros((BO, R), tl.float32)
        # Several loads at once, because a loop that ends with the last part waits for each load.
        for start in range(0, parts, 8):
            for part in tl.static_range(8):
                there = mask & (start + part < parts)
                db += tl.load(place + (start + part) * apart + within, mask=there, other=0.0)
        out = grads_ptr + tl.load(chunk + 13) + o[:, None] * _stride(chunk) + r[None, :]
        tl.store(out, (db * _scale(chunk)).to(kind), mask=mask)


@triton.jit(do_not_specialize=OF_BATCH)
def _of_a(
    x_ptr, table_ptr, q_ptr, grads_ptr, sums_ptr, ended_ptr, n_inputs, x_stride, list_at,
    R: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute da of one chunk for one tile of inputs, by a program for each part of its rows."""
    tile, number, part = tl.program_id(0), tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    chunk = table_ptr + list_at + number * CHUNK
    i, r = tile * BI + tl.arange(0, BI), tl.arange(0, R)
    in_i = i < n_inputs
    rank, begin, rows = _rank(chunk), tl.load(chunk + 6), tl.load(chunk + 7).to(tl.int32)
    q_place = _place(q_ptr, chunk + 8)
    share = tl.cdiv(tl.cdiv(rows, PARTS), BN) * BN
    end = tl.minimum(rows, (part + 1) * share)
    da = tl.zeros((R, BI), tl.float32)
    for start in range(part * share, end, BN):
        n = start + tl.arange(0, BN)
        in_n = n < end
        place = x_ptr + (begin + n)[:, None] * x_stride + i[None, :]
        x = tl.load(place, mask=in_n[:, None] & in_i[None, :], other=0.0)
        da += tl.dot(tl.trans(_load_rows(q_place, n, rank, in_n, R)), x)
    mask, within = (r < rank)[:, None] & in_i[None, :], r[:, None] * n_inputs + i[None, :]
    sums = sums_ptr + (number * PARTS * R).to(tl.int64) * n_inputs + within
    tl.store(sums + part * R * n_inputs, da, mask=mask)
    # All of the program's numbers are written before it counts as ended.
    tl.debug_barrier()
    ended = ended_ptr + number * tl.num_programs(0) + tile
    if tl.atomic_add(ended, 1, sem="acq_rel") == PARTS - 1:
        # The last program to end adds up all parts, in their order.
        tl.debug_barrier()
        da = tl.zeros((R, BI), tl.float32)
        for other in tl.static_range(PARTS):
            da += tl.load(sums + other * R * n_inputs, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(grads_ptr + tl.load(chunk + 14) + within, da.to(grads_ptr.dtype.element_ty), mask=mask)
        tl.store(ended, 0)


launch_update = Launcher(_update, num_warps=4, num_stages=4)
launch_partial = Launcher(_partial, num_warps=4, num_stages=3)
launch_total = Launcher(_total, num_warps=4)
launch_of_a = Launcher(_of_a, num_warps=4, num_stages=2)


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, table: Table
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute y (N × O), and h of all terms whose B trains, on the current stream."""
    table.refresh()
    division = table.division
    x = aligned(x if x.stride(1) == 1 else x.contiguous())
    y = x.new_empty(x.shape[0], division.outputs)
    h, frozen = (
        x.new_empty(division.h_numbers),
        x.new_empty(division.frozen_numbers if division.several else 0),
    )
    split = max(1, min(256 // division.strips, division.outputs // 1024))
    blocks = -(-division.outputs // (split * TILE))
    launch_update(
        (division.strips * split, 1, 1),
        (x, x if bias is None else aligned(bias), table.numbers, h, frozen, y),
        (division.inputs, division.outputs, x.stride(0), division.chunks_at, division.strips, blocks),
        (division.ranks, division.strip, TILE, TILE, bias is not None, division.several),
    )
    return y.addmm_(x, weight.t()), h


def backward(
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    table: Table,
    h: torch.Tensor,
    *,
    needs_grad_x: bool = True,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Compute grad_x, if it is needed, and the gradients of what trains, on the current stream."""
    division = table.division
    g = aligned(g if g.stride(1) == 1 else g.contiguous())
    q, grads = g.new_empty(division.q_numbers), g.new_empty(division.grads)
    sums = torch.empty(division.sums, device=g.device, dtype=torch.float32)
    if division.parts:
        launch_partial(
            (division.tiles, division.parts, 1),
            (g, table.numbers, h, sums),
            (division.outputs, g.stride(0), division.parts_at),
            (division.ranks, 64, division.tile_o),
        )
    to_x, grad_x = ABSENT, None
    if needs_grad_x:
        to_x = ADD if division.adds else WRITE
        grad_x = g @ weight if division.adds else g.new_empty(g.shape[0], division.inputs)
    split = max(1, min(1056 // division.strips, division.inputs // 512)) if needs_grad_x else 1
    summed = SUMMED // division.ranks
    launch_total(
        (division.strips * split + division.with_b * -(-division.outputs // summed), 1, 1),
        (sums, table.numbers, q, q if grad_x is None else grad_x, grads),
        (
            division.inputs, division.outputs, division.inputs,
            division.chunks_at, division.b_at, division.strips,
            -(-division.inputs // (split * TILE)), split,
        ),
        (division.tiles, division.ranks, division.strip, summed, TILE, to_x, division.several),
    )  # fmt: skip
    if x is not None:
        _gradients_of_a(x, q, grads, table)
    if grad_x is not None and not division.adds:
        grad_x.addmm_(g, weight)
    return grad_x, [grads[at : at + math.prod(shape)].view(shape) for at, shape in division.views]


def _gradients_of_a(x: torch.Tensor, q: torch.Tensor, grads: torch.Tensor, table: Table) -> None:
    division = table.division
    x = aligned(x if x.stride(1) == 1 else x.contiguous())
    if division.with_a:
        sums = torch.empty(
            division.with_a * PARTS_OF_A * division.ranks * division.inputs,
            device=x.device,
            dtype=torch.float32,
        )
        launch_of_a(
            (division.tiles_a, division.with_a * PARTS_OF_A, 1),
            (x, table.numbers, q, grads, sums, table.ended),
            (division.inputs, x.stride(0), division.a_at),
            (division.ranks, 128, division.tile_a, PARTS_OF_A),
        )
    for rows, place, rank, to in division.long:
        width, count = -(-rank // 8) * 8, rows.stop - rows.start
        mine = q[place : place + count * width].view(count, width)[:, :rank]
        out = grads[to : to + rank * division.inputs].view(rank, division.inputs)
        torch.mm(mine.t(), x[rows], out=out)

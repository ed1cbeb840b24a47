"""The Triton kernels of `rayft.kernels.low_rank_linear`, which says what they compute."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from rayft.kernels.launch_triton import Launcher, aligned

__all__ = ["gradients", "update"]

TILE = 128
"""Inputs or outputs that a program handles at once."""
MOST_PARTS = 32
"""The most parts that the rows are divided into."""


# No kernel is specialised on numbers that depend on the number of rows: it differs from batch to batch, and
# each batch would compile a kernel. Of a layer's sizes and a rank, only divisibility by 16 matters, which
# decides how wide loads are. In `_total`, the number of tiles that q is the sum of is a constant, because
# loads in a loop with an unknown end wait for one another.
OF_ROWS = ["n_rows", "row_blocks", "blocks", "rows", "split", "parts"]


@triton.jit(do_not_specialize=OF_ROWS)
def _update(
    x_ptr, a_ptr, b_ptr, bias_ptr, h_ptr, y_ptr,
    n_rows, n_inputs, n_outputs, x_stride, rank, row_blocks, blocks, scale,
    R: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    SELECT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Compute h of a strip of rows, then `blocks` tiles of its outputs."""
    block = tl.program_id(0)
    first = block // row_blocks * blocks
    n = block % row_blocks * BN + tl.arange(0, BN)
    r = tl.arange(0, R)
    in_n, in_r = n < n_rows, r < rank
    row = n[:, None].to(tl.int64)
    if SELECT:
        column = tl.load(a_ptr + r, mask=in_r, other=0)
        h = tl.load(x_ptr + row * x_stride + column[None, :], mask=in_n[:, None] & in_r[None, :], other=0.0)
    else:
        total = tl.zeros((BN, R), tl.float32)
        for start in range(0, n_inputs, BI):
            i = start + tl.arange(0, BI)
            in_i = i < n_inputs
            x = tl.load(x_ptr + row * x_stride + i[None, :], mask=in_n[:, None] & in_i[None, :], other=0.0)
            a = tl.load(
                a_ptr + r[:, None] * n_inputs + i[None, :], mask=in_r[:, None] & in_i[None, :], other=0.0
            )
            total += tl.dot(x, tl.trans(a))
        h = total.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + row * rank + r[None, :], h, mask=in_n[:, None] & in_r[None, :] & (first == 0))
    for number in range(first, first + blocks):
        o = number * BO + tl.arange(0, BO)
        in_o = o < n_outputs
        b = tl.load(b_ptr + o[:, None] * rank + r[None, :], mask=in_o[:, None] & in_r[None, :], other=0.0)
        y = tl.dot(h, tl.trans(b)) * scale
        if BIAS:
            y += tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
        place = y_ptr + row * n_outputs + o[None, :]
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=in_n[:, None] & in_o[None, :])


@triton.jit(do_not_specialize=OF_ROWS)
def _partial(
    g_ptr, b_ptr, h_ptr, sums_ptr, n_rows, n_outputs, g_stride, rank, frozen, rows,
    R: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Compute q of one tile of outputs and db of one part, `rows` rows."""
    tile, part = tl.program_id(0), tl.program_id(1)
    o = tile * BO + tl.arange(0, BO)
    r = tl.arange(0, R)
    in_o, in_r = o < n_outputs, r < rank
    b = tl.load(b_ptr + o[:, None] * rank + r[None, :], mask=in_o[:, None] & in_r[None, :], other=0.0)
    db = tl.zeros((R, BO), tl.float32)
    for start in range(0, rows, BN):
        n = part * rows + start + tl.arange(0, BN)
        in_n = n < n_rows
        row = n[:, None].to(tl.int64)
        g = tl.load(g_ptr + row * g_stride + o[None, :], mask=in_n[:, None] & in_o[None, :], other=0.0)
        h = tl.load(
            h_ptr + row * (rank - frozen) + (r - frozen)[None, :],
            mask=in_n[:, None] & (in_r & (r >= frozen))[None, :],
            other=0.0,
        )
        tl.store(sums_ptr + (row + tile * n_rows) * R + r[None, :], tl.dot(g, b), mask=in_n[:, None])
        db += tl.dot(tl.trans(h), g)
    # The sums of db are stored after those of q, one matrix (R × O) for each part.
    place = sums_ptr + tl.num_programs(0).to(tl.int64) * n_rows * R
    place += (part * R + r[:, None]).to(tl.int64) * n_outputs + o[None, :]
    tl.store(place, db, mask=in_o[None, :])


@triton.jit(do_not_specialize=OF_ROWS)
def _total(
    sums_ptr, a_ptr, q_ptr, x_ptr, db_ptr, n_rows, n_inputs, n_outputs, x_stride, rank, frozen,
    row_blocks, blocks, split, parts, scale,
    TILES: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    MOST_PARTS: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Add up q, by `split` programs for a strip of rows with `blocks` tiles of grad_x each, and then db."""
    block = tl.program_id(0)
    r = tl.arange(0, R)
    in_r = r < rank
    if block < row_blocks * split:
        first = block // row_blocks * blocks
        n = block % row_blocks * BN + tl.arange(0, BN)
        in_n = n < n_rows
        row = n[:, None].to(tl.int64)
        mask = in_n[:, None] & in_r[None, :]
        q = tl.zeros((BN, R), tl.float32)
        for tile in tl.static_range(TILES):
            q += tl.load(sums_ptr + (row + tile * n_rows) * R + r[None, :], mask=mask, other=0.0)
        q *= scale
        if SELECT:
            column = tl.load(a_ptr + r, mask=in_r, other=0)
            place = x_ptr + row * x_stride + column[None, :]
            q += tl.load(place, mask=mask, other=0.0).to(tl.float32)
            tl.store(place, q.to(x_ptr.dtype.element_ty), mask=mask)
        else:
            low = q.to(q_ptr.dtype.element_ty)
            tl.store(q_ptr + row * rank + r[None, :], low, mask=mask & (first == 0))
            for number in range(first, first + blocks):
                i = number * BI + tl.arange(0, BI)
                in_i = i < n_inputs
                a = tl.load(
                    a_ptr + r[:, None] * n_inputs + i[None, :], mask=in_r[:, None] & in_i[None, :], other=0.0
                )
                added = tl.dot(low, a).to(x_ptr.dtype.element_ty)
                tl.store(x_ptr + row * x_stride + i[None, :], added, mask=in_n[:, None] & in_i[None, :])
    else:
        o = (block - row_blocks * split) * BO + tl.arange(0, BO)
        mask_o = (o < n_outputs)[:, None] & (in_r & (r >= frozen))[None, :]
        db_ptrs = sums_ptr + n_rows.to(tl.int64) * (TILES * R) + r[None, :] * n_outputs + o[:, None]
        db = tl.zeros((BO, R), tl.float32)
        # One iteration with all loads at once, because a loop that ends with the last part waits for each
        # load. With 8 or 16 parts an iteration, or without the outer loop, a layer's kernels took up to 8 %
        # longer on an H100.
        for start in range(0, parts, MOST_PARTS):
            for part in tl.static_range(MOST_PARTS):
                there = mask_o & (start + part < parts)
                db += tl.load(db_ptrs + (start + part) * R * n_outputs, mask=there, other=0.0)
        db *= scale
        out = db_ptr + o[:, None] * (rank - frozen) + (r - frozen)[None, :]
        tl.store(out, db.to(db_ptr.dtype.element_ty), mask=mask_o)


launch_update = Launcher(_update, num_warps=4, num_stages=4)
launch_partial = Launcher(_partial, num_warps=8, num_stages=3)
launch_total = Launcher(_total, num_warps=4)


def update(
    x: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write bias + s·h Bᵀ (N × O) and h (N × K) on the current stream."""
    x = aligned(x if x.stride(1) == 1 else x.contiguous())
    a, b = aligned(a.contiguous()), aligned(b.contiguous())
    (n_rows, n_inputs), (n_outputs, rank) = x.shape, b.shape
    y = x.new_empty(n_rows, n_outputs)
    h = x.new_empty(n_rows, rank)
    strip = _strip(n_rows)
    row_blocks = -(-n_rows // strip)
    split, blocks = _shares(row_blocks, n_outputs, 256, 1024)
    launch_update(
        (row_blocks * split, 1, 1),
        (x, a, b, x if bias is None else aligned(bias), h, y),
        (n_rows, n_inputs, n_outputs, x.stride(0), rank, row_blocks, blocks),
        (_padded(rank), strip, TILE, TILE, a.ndim == 1, bias is not None),
        (scale,),
    )
    return y, h


def gradients(
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    h: torch.Tensor,
    scale: float,
    grad_x: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute (grad_x, q, db) on the current stream.

    Where A is a matrix, grad_x comes new and holds q A; where it is a list of columns, q is added into
    the given `grad_x` and what is returned as q means nothing.
    """
    g = aligned(g if g.stride(1) == 1 else g.contiguous())
    a, b, h = aligned(a.contiguous()), aligned(b.contiguous()), aligned(h.contiguous())
    (n_rows, n_outputs), rank, trained = g.shape, b.shape[1], h.shape[1]
    select, padded = a.ndim == 1, _padded(rank)
    if grad_x is None:
        grad_x = g.new_empty(n_rows, a.shape[1])
    q = grad_x if select else g.new_empty(n_rows, rank)
    db = g.new_empty(n_outputs, trained)
    tile_o, tile_n, tiles, parts, rows = _tiles(n_rows, n_outputs, padded)
    # Sums of q for each tile of outputs, then sums of db for each part of the rows.
    numbers = (tiles * n_rows + parts * n_outputs) * padded
    sums = torch.empty(numbers, device=g.device, dtype=torch.float32)
    launch_partial(
        (tiles, parts, 1),
        (g, b, h, sums),
        (n_rows, n_outputs, g.stride(0), rank, rank - trained, rows),
        (padded, tile_n, tile_o),
    )
    strip, n_inputs = _strip(n_rows), grad_x.shape[1]
    row_blocks = -(-n_rows // strip)
    split, blocks = (1, 0) if select else _shares(row_blocks, n_inputs, 1056, 512)
    shares = (row_blocks, blocks, split)
    launch_total(
        (row_blocks * split + -(-n_outputs // 64), 1, 1),
        (sums, a, q, grad_x, db),
        (n_rows, n_inputs, n_outputs, grad_x.stride(0), rank, rank - trained, *shares, parts),
        (tiles, padded, strip, 64, TILE, MOST_PARTS, select),
        (scale,),
    )
    return grad_x, q, db


@lru_cache(maxsize=4096)
def _tiles(n_rows: int, n_outputs: int, padded: int) -> tuple[int, int, int, int, int]:
    """Choose the sizes of tiles, and the numbers of tiles of outputs and of parts of rows.

    By measurement on an H200: large tiles where there is enough of g to fill the device.
    """
    big = n_rows * n_outputs >= 2**24
    tile_o, tile_n = (256 if big else 128), (128 if padded == 16 else 64)
    tiles = -(-n_outputs // tile_o)
    parts = max(1, min(-(-n_rows // tile_n), (132 if big else 264) // tiles, MOST_PARTS))
    share = -(-n_rows // parts)
    rows = -(-share // tile_n) * tile_n
    return tile_o, tile_n, tiles, parts, rows


@lru_cache(maxsize=256)
def _padded(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))


@lru_cache(maxsize=4096)
def _strip(n_rows: int) -> int:
    """Return the rows of a strip, so that strips fill the device and none is too small for a matrix unit."""
    return min(32, max(16, int(triton.next_power_of_2(n_rows // 256))))


@lru_cache(maxsize=4096)
def _shares(row_blocks: int, width: int, programs: int, least: int) -> tuple[int, int]:
    """Split strips for a number of programs, each with at least `least` numbers: (parts, tiles of each)."""
    split = max(1, min(programs // row_blocks, width // least))
    blocks = -(-width // (split * TILE))
    return -(-width // (blocks * TILE)), blocks

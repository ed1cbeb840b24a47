"""The Triton kernels of `rayft.kernels.columns`, which says what they compute."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rayft.kernels.launch_triton import Launcher

__all__ = ["gather", "write"]

TILE = 1024
"""Numbers that a program moves."""


@triton.jit
def _gather(x_ptr, columns, out_ptr, n_rows, stride, inner, rank, R: tl.constexpr, BN: tl.constexpr):
    n, r = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, R)
    in_r = r < rank
    mask = (n < n_rows)[:, None] & in_r[None, :]
    column = tl.load(columns + r, mask=in_r, other=0)
    values = tl.load(x_ptr + n[:, None].to(tl.int64) * stride + column[None, :] * inner, mask=mask)
    tl.store(out_ptr + n[:, None].to(tl.int64) * rank + r[None, :], values, mask=mask)


@triton.jit
def _write(w_ptr, columns, p_ptr, n_rows, stride, inner, rank, R: tl.constexpr, BN: tl.constexpr):
    n, r = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, R)
    in_r = r < rank
    mask = (n < n_rows)[:, None] & in_r[None, :]
    column = tl.load(columns + r, mask=in_r, other=0)
    values = tl.load(p_ptr + n[:, None].to(tl.int64) * rank + r[None, :], mask=mask)
    place = w_ptr + n[:, None].to(tl.int64) * stride + column[None, :] * inner
    tl.store(place, values.to(w_ptr.dtype.element_ty), mask=mask)


launch_gather = Launcher(_gather, num_warps=4)
launch_write = Launcher(_write, num_warps=4)


def gather(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Launch the gather on the current stream."""
    out = x.new_empty(x.shape[0], columns.numel())
    _run(launch_gather, x, columns, out)
    return out


def write(w: torch.Tensor, columns: torch.Tensor, p: torch.Tensor) -> None:
    """Launch the write on the current stream."""
    _run(launch_write, w, columns, p.contiguous())


def _run(launch: Launcher, matrix: torch.Tensor, columns: torch.Tensor, packed: torch.Tensor) -> None:
    n_rows, rank = packed.shape
    padded = int(triton.next_power_of_2(rank))
    rows = max(1, TILE // padded)
    launch(
        (-(-n_rows // rows), 1, 1),
        (matrix, columns, packed),
        (n_rows, matrix.stride(0), matrix.stride(1), rank),
        (padded, rows),
    )

"""The Triton versions of `rayft.kernels.columns`; see there for what they compute."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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


def gather(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Launch the gather on the current stream."""
    out = torch.empty(x.shape[0], columns.numel(), dtype=x.dtype, device=x.device)
    _run(_gather, x, columns, out)
    return out


def write(w: torch.Tensor, columns: torch.Tensor, p: torch.Tensor) -> None:
    """Launch the write on the current stream."""
    _run(_write, w, columns, p.contiguous())


def _run(kernel, matrix: torch.Tensor, columns: torch.Tensor, packed: torch.Tensor) -> None:
    n_rows, rank = packed.shape
    padded = triton.next_power_of_2(rank)
    rows = max(1, TILE // padded)
    kernel[(triton.cdiv(n_rows, rows),)](
        matrix, columns, packed, n_rows, matrix.stride(0), matrix.stride(1), rank,
        R=padded, BN=rows, num_warps=4,
    )  # fmt: skip

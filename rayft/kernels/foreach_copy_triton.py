"""The Triton kernel of `rayft.kernels.foreach_copy`, which says what it does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rayft.kernels.foreach_copy import BLOCK
from rayft.kernels.launch_triton import Launcher

__all__ = ["copy"]

WIDE = tl.constexpr(8)
"""Numbers that are moved at once."""


@triton.jit
def _address(entry, kind: tl.constexpr):
    """Read an address that is a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(kind)), 16)


@triton.jit
def _copy(table_ptr, like_ptr, BLOCK: tl.constexpr):
    row = table_ptr + tl.program_id(0) * 3
    kind: tl.constexpr = like_ptr.dtype.element_ty
    source, target, count = _address(row, kind), _address(row + 1, kind), tl.load(row + 2).to(tl.int32)
    whole = count // WIDE * WIDE
    n = tl.arange(0, BLOCK)
    tl.store(target + n, tl.load(source + n, mask=n < whole), mask=n < whole)
    rest = whole + tl.arange(0, WIDE)
    tl.store(target + rest, tl.load(source + rest, mask=rest < count), mask=rest < count)


launch_copy = Launcher(_copy, num_warps=4)


def copy(table: torch.Tensor, like: torch.Tensor) -> None:
    """Copy what a table says on the current stream.

    Args:
        table: see `rayft.kernels.foreach_copy.blocks`.
        like: a tensor of the dtype of all.
    """
    launch_copy((len(table), 1, 1), (table, like), (), (BLOCK,))

"""Copy many tensors, the same ones again and again, in one launch.

Semantics:

    ForeachCopy(targets, sources)()     ->  target.copy_(source) for each pair

torch's `_foreach_copy_` launches a kernel for every few dozen tensors. For the gradients of eight trials, 28
million numbers in 2,500 tensors, it needs 40 launches and 0.27 ms on an H200. Here a table on the device says
where each tensor is, so that one launch copies all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayft.kernels.launch_triton import ALIGNED
from rayft.numerics import moved

__all__ = ["BLOCK", "ForeachCopy", "blocks"]

BLOCK = 4096
"""Numbers that a program copies."""


class ForeachCopy:
    """Copies tensors to others of the same dtype and size, whose memory must stay where it is."""

    def __init__(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Write the table.

        Args:
            targets: contiguous tensors on one device.
            sources: as many, of the same sizes, contiguous, on the same device.
        """
        self._pairs = [*zip(targets, sources, strict=True)]
        for target, source in self._pairs:
            assert target.numel() == source.numel(), "tensors of different sizes"
            assert all(one.is_contiguous() for one in (target, source)), "not contiguous"
        self._table: torch.Tensor | None = None
        if targets and all(_readable(one, targets[0]) for pair in self._pairs for one in pair):
            self._table = moved(blocks(targets, sources), targets[0].device)

    def __call__(self) -> None:
        """Copy, on the current stream."""
        if self._table is not None:
            from rayft.kernels.foreach_copy_triton import copy

            copy(self._table, self._pairs[0][0])
        elif self._pairs:
            targets, sources = (list(each) for each in zip(*self._pairs, strict=True))
            torch._foreach_copy_(targets, sources)


def _readable(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Return whether the kernel can use a tensor, which must be aligned and have the dtype of the others."""
    return tensor.is_cuda and tensor.data_ptr() % ALIGNED == 0 and tensor.dtype == like.dtype


def blocks(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the table: addresses of source and target, and numbers, of each block (blocks, 3), int64."""
    rows = []
    for target, source in zip(targets, sources, strict=True):
        begins = np.arange(0, source.numel(), BLOCK, dtype=np.int64)
        offsets = begins * source.element_size()
        counts = np.minimum(BLOCK, source.numel() - begins)
        rows.append(np.column_stack((source.data_ptr() + offsets, target.data_ptr() + offsets, counts)))
    return torch.from_numpy(np.concatenate(rows))

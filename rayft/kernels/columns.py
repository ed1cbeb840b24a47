"""Read and write single columns of a matrix.

Semantics:

    gather_columns(x, columns)          ->  x[:, columns]            # (N × I) -> (N × R), contiguous
    write_columns(w, columns, p)        ->  w[:, columns] = p        # (O × I) <- (O × R), in place

torch's own index kernels are slow for this: 16 columns of 8,192 × 2,048 in bfloat16 take 20 µs on an
H200, a copy of 16 neighbouring columns takes 7. The Triton version moves a tile of rows at once.

Shapes: N tokens, I inputs, O outputs, R columns.
"""

from __future__ import annotations

import torch

__all__ = ["gather_columns", "gather_reference", "write_columns", "write_reference"]


def gather_columns(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return x[:, columns] (N × R) as a new tensor.

    Args:
        x: (N × I).
        columns: (R,) int64; may repeat.
    """
    if x.is_cuda and x.numel():
        from rayft.kernels.columns_triton import gather

        return gather(x, columns)
    return gather_reference(x, columns)


def gather_reference(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Gather with torch's index_select."""
    return x.index_select(1, columns)


def write_columns(w: torch.Tensor, columns: torch.Tensor, p: torch.Tensor) -> None:
    """Set w[:, columns] = p in place, in w's dtype.

    Args:
        w: (O × I), any strides.
        columns: (R,) int64, distinct.
        p: (O × R).
    """
    if w.is_cuda:
        from rayft.kernels.columns_triton import write

        write(w, columns, p)
    else:
        write_reference(w, columns, p)


def write_reference(w: torch.Tensor, columns: torch.Tensor, p: torch.Tensor) -> None:
    """Write with torch's index_copy_."""
    w.index_copy_(1, columns, p.to(w.dtype))

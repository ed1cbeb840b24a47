"""The Triton kernel of `rayft.kernels.adamw`, which says what it computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rayft.kernels.launch_triton import Launcher, aligned

__all__ = ["update"]

BLOCK = 1024
"""Numbers that a program updates."""


@triton.jit(do_not_specialize=["number"])
def _adamw(
    weight_ptr, grad_ptr, mean_ptr, square_ptr, factors_ptr, count, number,
    kept, new_1, new_2, lr, root, eps,
    FACTOR: tl.constexpr, EIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if EIGHTS:
        # Triton then knows that 4 numbers are all inside or all outside, and moves them at once.
        count = count // 8 * 8
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if FACTOR:
        grad *= tl.load(factors_ptr + number).to(tl.float32)
        # NaN is the only number that differs from itself.
        grad = tl.where(grad == grad, grad, 0.0)  # noqa: PLR0124
    mean = tl.load(mean_ptr + place, mask=inside, other=0.0).to(tl.float32)
    mean += new_1 * (grad - mean)
    square = tl.load(square_ptr + place, mask=inside, other=0.0).to(tl.float32)
    square = square * (1 - new_2) + new_2 * grad * grad
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32) * kept
    weight -= lr * (mean / (tl.sqrt(square) / root + eps))
    tl.store(weight_ptr + place, weight.to(weight_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + place, mean.to(mean_ptr.dtype.element_ty), mask=inside)
    tl.store(square_ptr + place, square.to(square_ptr.dtype.element_ty), mask=inside)


launch_adamw = Launcher(_adamw, num_warps=4)


def update(
    weight: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    factors: torch.Tensor | None,
    number: int,
    rates: tuple[float, ...],
) -> None:
    """Launch the update on the current stream; see `rayft.kernels.adamw.reference_adamw`."""
    count = weight.numel()
    kept, beta_1, beta_2, *others = rates
    launch_adamw(
        (-(-count // BLOCK), 1, 1),
        (weight, grad, mean, square, weight if factors is None else aligned(factors)),
        (count, number),
        (factors is not None, count % 8 == 0, BLOCK),
        # Triton rounds floats to float32, in which 1 - 0.999 would be wrong in the fifth digit.
        (kept, 1 - beta_1, 1 - beta_2, *others),
    )

"""The kernel that copies many tensors. It also runs in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from rayft.kernels.foreach_copy import BLOCK, ForeachCopy, blocks

pytestmark = pytest.mark.gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SIZES = (1, 7, 8, 9, 4096, BLOCK + 1, 3 * BLOCK + 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_are_copied_and_nothing_else_is_written(dtype: torch.dtype) -> None:
    from rayft.kernels.foreach_copy_triton import copy

    torch.manual_seed(0)
    sources = [torch.randn(size, device=DEVICE).to(dtype) for size in SIZES]
    places = [-(-size // 8) * 8 for size in SIZES]
    flat = torch.zeros(sum(places) + 8, device=DEVICE, dtype=dtype)
    targets = [part[:size] for part, size in zip(flat.split([*places, 8]), SIZES, strict=False)]
    if INTERPRETED:
        copy(blocks(targets, sources), targets[0])
    else:
        ForeachCopy(targets, sources)()
    assert all(map(torch.equal, targets, sources))
    for target in targets:
        target.zero_()
    assert not flat.any()

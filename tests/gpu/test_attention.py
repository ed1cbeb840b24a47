"""Attention by segments on a GPU: FlashAttention over segments against a mask of all pairs in float64."""

from __future__ import annotations

import pytest
import torch

from rayft.models.attention import dense_mask, segment_attention
from rayft.numerics import assert_close
from tests.unit.models.test_attention import Layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention runs on GPUs"),
]

ROWS, WIDTH, SIZE = 2, 256, 64
OFFSETS = torch.tensor([0, 5, 6, 256, 256, 300, 512, 512], dtype=torch.int32)


@pytest.mark.parametrize("window", [None, 1, 17, 1000])
@pytest.mark.parametrize("groups", [2, 4])
def test_flash_attention_over_segments_is_that_of_a_mask(window: int | None, groups: int) -> None:
    torch.manual_seed(0)
    sizes = ((ROWS, 4, WIDTH, SIZE), *[(ROWS, groups, WIDTH, SIZE)] * 2)
    given = [torch.randn(size, device="cuda").bfloat16().requires_grad_() for size in sizes]
    exact = [one.detach().double().requires_grad_() for one in given]
    offsets = OFFSETS.cuda()
    found, _ = segment_attention(Layer(), *given, offsets.view(1, 1, 1, -1), 0.3, sliding_window=window)
    q, *heads = exact
    k, v = (one.repeat_interleave(4 // groups, 1) for one in heads)
    mask = dense_mask(offsets, ROWS, WIDTH, window)
    expected = ((q @ k.transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    # Rounded are the weights and the result; in the backward pass also the gradients of the scores.
    length = WIDTH + SIZE
    assert_close(found, expected, torch.bfloat16, length, depth=2)
    direction = torch.randn_like(expected).bfloat16()
    mine = torch.autograd.grad((found * direction).sum(), given)
    others = torch.autograd.grad((expected * direction).sum(), exact)
    for one, other in zip(mine, others, strict=True):
        assert_close(one, other, torch.bfloat16, length, depth=3)

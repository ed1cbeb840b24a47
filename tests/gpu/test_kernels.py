"""The Triton kernels against their references in float64."""

from __future__ import annotations

import pytest
import torch

from rayft.kernels import low_rank_linear as kernel
from rayft.kernels.columns import gather_columns, write_columns
from rayft.numerics import assert_close

pytestmark = pytest.mark.gpu

SIZES = [
    (1, 5, 9, 2, 1),
    (130, 70, 40, 3, 3),
    (2048, 512, 256, 16, 16),
    (4096, 8192, 64, 16, 16),
    (515, 2048, 96, 64, 16),
]
"""Tokens, outputs, inputs, rank, rank that trains."""


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("select", [False, True], ids=["matrix", "columns"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_rank_linear(size: tuple[int, ...], dtype: torch.dtype, select: bool) -> None:
    n, o, i, k, r = size
    x, w, bias = random(n, i, dtype=dtype), random(o, i, dtype=dtype), random(o, dtype=dtype)
    a = torch.randperm(i, device="cuda")[:k] if select else random(k, i, dtype=dtype)
    b, g = random(o, k, dtype=dtype), random(n, o, dtype=dtype)
    wide_a = a if select else a.double()
    for offset in (None, bias):
        y, h = kernel.forward(x, w, offset, a, b, 1.7)
        wide = None if offset is None else offset.double()
        exact_y, exact_h = kernel.reference_forward(x.double(), w.double(), wide, wide_a, b.double(), 1.7)
        assert_close(h, exact_h, dtype, i)
        # h is rounded, the update is rounded, and the base's product is added to it.
        assert_close(y, exact_y, dtype, i + k, depth=3)
    h = h[:, -r:]
    grad_x, q, db = kernel.backward(g, w, a, b, h, 1.7)
    exact_x, exact_q, exact_db = kernel.reference_backward(
        g.double(), w.double(), wide_a, b.double(), h.double(), 1.7
    )
    assert_close(grad_x, exact_x, dtype, o + k, depth=3)
    assert_close(db, exact_db, dtype, n)
    if not select:
        assert q is not None
        assert exact_q is not None
        assert_close(q, exact_q, dtype, o)
    again = kernel.backward(g, w, a, b, h, 1.7)
    assert torch.equal(again[2], db), "two runs differ"


def test_strided_operands() -> None:
    wide, w, a, b = random(300, 200), random(100, 64), random(16, 64), random(100, 16)
    g, h = wide[:, :100], random(300, 16)
    transposed = w.t().contiguous().t()
    for one, other in zip(
        kernel.backward(g, transposed, a, b, h, 1.0),
        kernel.backward(g.contiguous(), w, a, b, h, 1.0),
        strict=True,
    ):
        assert one is not None
        assert other is not None
        assert_close(one, other, torch.bfloat16, 100)


def compiled() -> int:
    """Count what has been compiled of the training kernels."""
    from rayft.kernels import low_rank_linear_triton as kernels

    each = (kernels._update, kernels._partial, kernels._total)
    return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in each)


def test_neither_numbers_of_rows_nor_addresses_are_compiled_for() -> None:
    w, a, b = random(192, 96), random(16, 96), random(192, 16)
    moved_a, moved_b = random(16 * 96 + 1)[1:].view(16, 96), random(192 * 16 + 1)[1:].view(192, 16)
    moved_a.copy_(a)
    moved_b.copy_(b)

    def step(rows: int, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor | None]:
        x, g = (random(8200, width)[:rows] for width in (96, 192))
        y, h = kernel.forward(x, w, None, a, b, 1.0)
        exact_y, _ = kernel.reference_forward(x.double(), w.double(), None, a.double(), b.double(), 1.0)
        assert_close(y, exact_y, torch.bfloat16, 96 + 16, depth=3)
        return [y, *kernel.backward(g, w, a, b, h, 1.0)]

    # Short and long strips of rows are two kernels.
    for rows in (2048, 8192):
        step(rows, a, b)
    before = compiled()
    for rows in (1, 16, 77, 1000, 2036, 2047, 4097, 8200):
        torch.manual_seed(rows)
        plain = step(rows, a, b)
        torch.manual_seed(rows)
        for one, other in zip(plain, step(rows, moved_a, moved_b), strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)
    assert compiled() == before


@pytest.mark.parametrize("rank", [1, 3, 16, 200])
def test_columns(rank: int) -> None:
    x = random(1000, 333)
    columns = torch.randperm(333, device="cuda")[:rank]
    assert torch.equal(gather_columns(x, columns), x[:, columns])
    assert torch.equal(gather_columns(x.t().contiguous().t(), columns), x[:, columns])
    p, expected = random(1000, rank), x.clone()
    expected[:, columns] = p
    write_columns(x, columns, p)
    assert torch.equal(x, expected)

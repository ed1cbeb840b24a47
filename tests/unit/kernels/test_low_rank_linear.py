"""The plain versions of the layer kernels against their semantics; tests/gpu has the Triton ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rayft.kernels import columns, low_rank_linear
from rayft.numerics import assert_close

N, OUT, IN, K, R, SCALE = 7, 5, 9, 4, 3, 1.7


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(params=["matrix", "columns", "repeated"])
def a(request: pytest.FixtureRequest) -> torch.Tensor:
    return {
        "matrix": random(K, IN),
        "columns": torch.tensor([8, 0, 3, 5]),
        "repeated": torch.tensor([2, 3, 2, 3]),
    }[request.param]


def dense(a: torch.Tensor) -> torch.Tensor:
    return functional.one_hot(a, IN).double() if a.ndim == 1 else a


@pytest.mark.parametrize("bias", [True, False])
def test_forward(a: torch.Tensor, bias: bool) -> None:
    x, w, b = random(N, IN), random(OUT, IN), random(OUT, K)
    offset = random(OUT) if bias else None
    y, h = low_rank_linear.forward(x, w, offset, a, b, SCALE)
    assert_close(h, x @ dense(a).t(), torch.float64, IN)
    assert_close(y, functional.linear(x, w + SCALE * b @ dense(a), offset), torch.float64, IN + K, depth=3)


def test_backward(a: torch.Tensor) -> None:
    x, w, b, g = (
        random(N, IN).requires_grad_(True),
        random(OUT, IN),
        random(OUT, K).requires_grad_(True),
        random(N, OUT),
    )
    ((x @ (w + SCALE * b @ dense(a)).t()) * g).sum().backward()
    assert x.grad is not None
    assert b.grad is not None
    h = (x.detach() @ dense(a).t())[:, -R:]
    grad_x, q, db = low_rank_linear.backward(
        g, w, a, b.detach(), h, SCALE, distinct=a.unique().numel() == a.numel()
    )
    assert_close(grad_x, x.grad, torch.float64, OUT + K, depth=3)
    assert_close(db, b.grad[:, -R:], torch.float64, N)
    if a.ndim == 2:
        assert q is not None
        assert_close(q, SCALE * g @ b.detach(), torch.float64, OUT)


def test_columns() -> None:
    x, index = random(N, IN), torch.tensor([8, 0, 3])
    assert torch.equal(columns.gather_columns(x, index), x[:, index])
    p, written = random(N, 3), x.clone()
    columns.write_columns(written, index, p)
    x[:, index] = p
    assert torch.equal(written, x)

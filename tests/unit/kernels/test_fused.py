"""The operations between a decoder's products against float64, as they are and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rayft.kernels import fused
from rayft.kernels.fused import add_rms_norm, gated, rms_norm, rotate
from rayft.numerics import assert_close

WIDTH, EPS = 24, 1e-3


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Compile everything, as on a GPU, but for kernels; it counts how often."""
    torch._dynamo.reset()
    found = CompileCounterWithBackend("aot_eager")
    made: dict[Any, Any] = {}

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in made:
            made[function] = torch.compile(function, dynamic=False, backend=found)
        return made[function]

    monkeypatch.setattr(fused, "compiles", lambda _: True)
    monkeypatch.setattr(fused, "compiled", compiled)
    return found


def random(*size: int) -> torch.Tensor:
    return torch.randn(size).requires_grad_()


def norm(x: torch.Tensor, weight: torch.Tensor, kind: str) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (weight + (kind == "shifted"))


def half(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([-x[..., 4:], x[..., :4]], -1)


Pair = tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]


def pairs(rows: int = 2, width: int = 5) -> dict[str, Pair]:
    """Return each operation, the same by its equation, and inputs."""
    x, other, weight = random(rows, width, WIDTH), random(rows, width, WIDTH), random(WIDTH)
    # As projections return them: (B, T, H, D), transposed.
    q, k = (random(rows, width, heads, 8).transpose(1, 2) for heads in (4, 2))
    angle = torch.randn(rows, width, 8)
    found: dict[str, Pair] = {
        kind: (
            lambda x, w, kind=kind: rms_norm(x, w, EPS, kind),  # type: ignore[misc]
            lambda x, w, kind=kind: norm(x, w, kind),  # type: ignore[misc]
            [x, weight],
        )
        for kind in ("rounded", "wide", "shifted")
    }
    found["add"] = (
        lambda x, r, w: torch.cat(add_rms_norm(x, r, w, EPS, "rounded")),
        lambda x, r, w: torch.cat([x + r, norm(x + r, w, "rounded")]),
        [x, other, weight],
    )
    found["silu"] = (lambda g, u: gated(g, u, "silu"), lambda g, u: g * g.sigmoid() * u, [x, other])
    found["gelu"] = (
        lambda g, u: gated(g, u, "gelu"),
        lambda g, u: 0.5 * g * (1 + ((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)).tanh()) * u,
        [x, other],
    )
    found["rotate"] = (
        lambda q, k: torch.cat(rotate(q, k, angle.cos(), angle.sin()), 1),
        lambda q, k: torch.cat(
            [one * angle.cos()[:, None] + half(one) * angle.sin()[:, None] for one in (q, k)], 1
        ),
        [q, k],
    )
    return found


def check(function: Callable[..., Any], equation: Callable[..., Any], inputs: list[torch.Tensor]) -> None:
    exact = [one.detach().double().requires_grad_() for one in inputs]
    found, expected = function(*inputs), equation(*exact)
    assert_close(found, expected, torch.float32, WIDTH, depth=4)
    direction = torch.randn_like(found)
    mine = torch.autograd.grad(found, inputs, direction)
    others = torch.autograd.grad(expected, exact, direction.double())
    for one, other in zip(mine, others, strict=True):
        assert_close(one, other, torch.float32, WIDTH * 10, depth=8)


@pytest.mark.parametrize("name", pairs())
def test_operations_are_their_equations(name: str) -> None:
    check(*pairs()[name])
    if name in ("rounded", "shifted"):
        # Confused with one another, they would be noticed.
        other = {"rounded": "shifted", "shifted": "rounded"}[name]
        with pytest.raises(AssertionError, match="relative error"):
            check(pairs()[name][0], pairs()[other][1], pairs()[name][2])


def test_other_sizes_of_a_batch_are_not_compiled_again(counter: CompileCounterWithBackend) -> None:
    for rows, width in ((2, 5), (1, 3), (4, 7), (1, 12)):
        before = counter.frame_count
        for function, equation, inputs in pairs(rows, width).values():
            check(function, equation, inputs)
        assert (counter.frame_count == before) == (before > 0)


def test_angles_of_one_row_are_those_of_all_rows() -> None:
    q, k, angle = random(3, 4, 5, 8), random(3, 2, 5, 8), torch.randn(1, 5, 8)
    expected = rotate(q, k, angle.cos().expand(3, 5, 8), angle.sin().expand(3, 5, 8))
    for one, other in zip(rotate(q, k, angle.cos(), angle.sin()), expected, strict=True):
        assert torch.equal(one, other)

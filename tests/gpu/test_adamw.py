"""The kernel of AdamW against its reference in float64. It also runs in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from rayft.kernels.adamw import reference_adamw
from rayft.numerics import assert_close

pytestmark = pytest.mark.gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RATES = (0.97, 0.9, 0.99, 0.1, 0.2, 1e-8)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("factor", [None, 0.25, 0.0, torch.nan])
@pytest.mark.parametrize("count", [1, 1000, 4104, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_its_reference(count: int, factor: float | None, dtype: torch.dtype) -> None:
    from rayft.kernels.adamw_triton import update

    torch.manual_seed(0)
    given = [torch.randn(count, device=DEVICE).to(dtype) for _ in range(3)]
    given.append(torch.rand(count, device=DEVICE).to(dtype))
    if factor == 0.0:
        given[1][0] = torch.inf
    factors = None if factor is None else torch.tensor([-1.0, -1.0, factor], device=DEVICE)
    exact = [one.double() for one in given]
    reference_adamw(*exact, None if factors is None else factors.double(), 2, RATES)
    found = [one.clone() for one in given]
    update(*found, factors, 2, RATES)
    assert torch.equal(found[1], given[1]), "the gradient has changed"
    for one, expected in zip(found[::2], exact[::2], strict=True):
        assert_close(one, expected, dtype, 8)
    assert_close(found[3], exact[3], dtype, 8)


@pytest.mark.parametrize("beta_2", [0.999, 0.99999])
def test_the_first_step_with_a_beta_near_1(monkeypatch: pytest.MonkeyPatch, beta_2: float) -> None:
    from rayft.kernels import adamw_triton as kernels

    if INTERPRETED:
        # Compiled kernels receive floats in float32; the interpreter leaves them as they are.
        launch = kernels.launch_adamw
        monkeypatch.setattr(
            kernels,
            "launch_adamw",
            lambda *others: launch(*others[:-1], tuple(torch.tensor(others[-1]).tolist())),
        )
    torch.manual_seed(0)
    weight, grad = torch.randn(2, 1000, device=DEVICE)
    given = [weight, grad, torch.zeros_like(weight), torch.zeros_like(weight)]
    rates = (1.0, 0.9, beta_2, 0.1 / (1 - 0.9), (1 - beta_2) ** 0.5, 1e-8)
    exact = [one.double() for one in given]
    reference_adamw(*exact, None, 0, rates)
    kernels.update(*given, None, 0, rates)
    for one, expected in zip(given, exact, strict=True):
        assert_close(one, expected, torch.float32, 8)

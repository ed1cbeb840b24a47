from __future__ import annotations

import pytest
import torch

from rayft.kernels.adamw import adamw


def updated(weight: torch.Tensor, grads: list[torch.Tensor], factor: float | None) -> torch.Tensor:
    factors = None if factor is None else torch.tensor([-1.0, factor])
    found, mean, square = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step, grad in enumerate(grads, 1):
        adamw(
            found,
            grad,
            mean,
            square,
            factors=factors,
            number=1,
            step=step,
            lr=0.1,
            betas=(0.9, 0.99),
            eps=1e-8,
            decay=0.3,
        )
    return found


def test_steps_are_those_of_torchs_optimizer() -> None:
    torch.manual_seed(0)
    weight, grads = torch.randn(37), [torch.randn(37) for _ in range(5)]
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.3, foreach=False)
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
    assert torch.equal(updated(weight, grads, None), parameter.detach())


def test_the_factor_multiplies_the_gradient_which_stays_as_it_is() -> None:
    torch.manual_seed(0)
    weight, grads = torch.randn(37), [torch.randn(37) for _ in range(5)]
    before = [grad.clone() for grad in grads]
    expected = updated(weight, [0.25 * grad for grad in grads], None)
    assert torch.equal(updated(weight, grads, 0.25), expected)
    assert all(map(torch.equal, grads, before))


@pytest.mark.parametrize(("bad", "factor"), [(torch.nan, 0.5), (torch.inf, 0.0), (1.0, torch.nan)])
def test_what_becomes_nan_counts_as_zero(bad: float, factor: float) -> None:
    weight, grad = torch.ones(3), torch.tensor([1.0, bad, 2.0])
    expected = updated(weight, [(grad * factor).nan_to_num(0.0)], None)
    assert expected.isfinite().all()
    assert torch.equal(updated(weight, [grad], factor), expected)

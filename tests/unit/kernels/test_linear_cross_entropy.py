"""The loss of an output layer in chunks, against that of all logits."""

from __future__ import annotations

import pytest
import torch

from rayft.kernels import linear_cross_entropy as module
from rayft.kernels.linear_cross_entropy import linear_cross_entropy, reference
from rayft.numerics import assert_close, relative_error, tolerance

TARGETS, WIDTH, VOCABULARY = 11, 16, 37


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(TARGETS, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype)
    return hidden, weight, torch.randint(0, VOCABULARY, (TARGETS,))


@pytest.mark.parametrize("rows", [1, 4, 11, 2048])
def test_losses_and_gradients_are_those_of_all_logits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    hidden, weight, targets = inputs()
    exact = hidden.detach().double().requires_grad_()
    losses, expected = (
        linear_cross_entropy(hidden, weight, targets),
        reference(exact, weight.double(), targets),
    )
    assert losses.dtype == torch.float32
    assert_close(losses, expected, torch.float32, VOCABULARY, depth=4)
    # Each target's loss has a weight of its own, as in a batch of several runs.
    outer = torch.randn(TARGETS)
    (found,) = torch.autograd.grad(losses, hidden, outer)
    (other,) = torch.autograd.grad(expected, exact, outer)
    assert_close(found, other, torch.float32, VOCABULARY, depth=4)
    wrong = found.roll(1, 0)
    assert relative_error(wrong, other) > 100 * tolerance(torch.float32, VOCABULARY, depth=4)


def test_few_logits_exist_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS", 3 * VOCABULARY)
    seen: list[int] = []
    run = module.run
    monkeypatch.setattr(
        module, "run", lambda f, logits, *rest: (seen.append(len(logits)), run(f, logits, *rest))[1]
    )
    linear_cross_entropy(*inputs())
    assert seen == [3, 3, 3, 2]


def test_in_bfloat16_it_is_as_near_as_all_logits_are() -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    exact = hidden.detach().double().requires_grad_()
    expected = reference(exact, weight.double(), targets)
    (direction,) = torch.autograd.grad(expected.sum(), exact)

    def errors(function: object) -> tuple[float, float]:
        losses = function(hidden, weight, targets)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(losses.sum(), hidden)
        return relative_error(losses, expected), relative_error(gradient, direction)

    for mine, plain in zip(errors(linear_cross_entropy), errors(reference), strict=True):
        assert mine <= 1.5 * plain


def test_without_gradients_only_losses_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs()
    monkeypatch.setattr(module, "_losses_and_slope", None)
    losses = linear_cross_entropy(hidden.detach(), weight, targets)
    assert_close(losses, reference(hidden, weight, targets), torch.float32, VOCABULARY, depth=4)


def test_no_targets_have_no_losses() -> None:
    hidden, weight, _ = inputs()
    losses = linear_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert losses.shape == (0,)
    assert not gradient.any()


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, targets = inputs()
    (first,) = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets).pow(2).sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()

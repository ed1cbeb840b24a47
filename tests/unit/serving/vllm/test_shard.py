"""Tensor parallelism: what the workers compute adds up to the whole adapter's product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from rayft.kernels.segment_lora import SlotFactors, reference
from rayft.numerics import assert_close
from rayft.serving.engine.vllm.shard import Part, described, key, parts_of, shard

OUTPUTS, INPUTS, TOKENS = 24, 32, 5


def lora() -> SlotFactors:
    return SlotFactors(b=torch.randn(OUTPUTS, 6), scale=0.7, a=torch.randn(6, INPUTS))


def selector() -> SlotFactors:
    columns = torch.tensor([31, 0, 7, 8, 8, 20, 15, 16])
    return SlotFactors(b=torch.randn(OUTPUTS, len(columns)), scale=1.3, columns=columns)


def selector_of_few() -> SlotFactors:
    """The inputs lie in the first half, so that other workers have none of them."""
    return SlotFactors(b=torch.randn(OUTPUTS, 2), scale=1.3, columns=torch.tensor([9, 3]))


KINDS = pytest.mark.parametrize("make", [lora, selector, selector_of_few])
WORKERS = pytest.mark.parametrize("workers", [2, 4])
Make = Callable[[], SlotFactors]


def product(x: torch.Tensor, factors: SlotFactors | None, outputs: int) -> torch.Tensor:
    """Compute the adapter's product of each token, in float64."""
    table = {} if factors is None else {1: factors}
    return reference(x, torch.zeros(len(x), outputs), [1] * len(x), table)


def columns(worker: int, heads: Sequence[int], width: int) -> Part:
    """The part of a worker that has one head of `width` outputs; `heads` says which."""
    first = heads[worker] * width
    return Part("q", (OUTPUTS, INPUTS), (first, first + width), (0, INPUTS))


@KINDS
@WORKERS
def test_workers_that_divide_the_outputs_have_one_slice_each(make: Make, workers: int) -> None:
    factors, x, width = make(), torch.randn(TOKENS, INPUTS), OUTPUTS // workers
    parts = [columns(worker, range(workers), width) for worker in range(workers)]
    slices = [product(x, shard(factors, part), part.size) for part in parts]
    assert_close(torch.cat(slices, dim=1), product(x, factors, OUTPUTS), torch.float64, INPUTS)


@KINDS
@WORKERS
def test_workers_that_divide_the_inputs_add_up(make: Make, workers: int) -> None:
    factors, x, width = make(), torch.randn(TOKENS, INPUTS), INPUTS // workers
    total = torch.zeros(TOKENS, OUTPUTS, dtype=torch.float64)
    for worker in range(workers):
        inputs = (worker * width, (worker + 1) * width)
        part = Part("o", (OUTPUTS, INPUTS), (0, OUTPUTS), inputs)
        total += product(x[:, slice(*inputs)], shard(factors, part), OUTPUTS)
    assert_close(total, product(x, factors, OUTPUTS), torch.float64, INPUTS)


@KINDS
def test_workers_that_share_a_head_of_keys_have_the_same_slice(make: Make) -> None:
    factors, x, heads = make(), torch.randn(TOKENS, INPUTS), [0, 0, 1, 1]
    whole = product(x, factors, OUTPUTS)
    for worker, head in enumerate(heads):
        part = columns(worker, heads, OUTPUTS // 2)
        expected = whole[:, slice(*part.outputs)]
        assert_close(product(x, shard(factors, part), part.size), expected, torch.float64, INPUTS)
        assert part.outputs == (head * 12, head * 12 + 12)


def test_a_worker_without_a_selected_input_needs_nothing() -> None:
    assert shard(selector_of_few(), Part("o", (OUTPUTS, INPUTS), (0, OUTPUTS), (16, 32))) is None


def test_dense_factors_are_not_copied() -> None:
    factors = lora()
    part = shard(factors, Part("o", (OUTPUTS, INPUTS), (8, 16), (16, 32)))
    assert part is not None
    assert part.a is not None
    assert factors.a is not None
    assert (part.b.data_ptr(), part.a.data_ptr()) == (factors.b[8:].data_ptr(), factors.a[:, 16:].data_ptr())


def test_another_process_knows_what_a_worker_has() -> None:
    halves = [(Part("o", (OUTPUTS, INPUTS), (0, OUTPUTS), inputs),) for inputs in ((0, 16), (16, 32))]
    assert [parts_of(described(half)) for half in halves] == halves
    assert parts_of(described(())) == ()
    keys = {key(parts, dtype) for parts in (*halves, ()) for dtype in (torch.bfloat16, torch.float16)}
    assert len(keys) == 6
    assert key(parts_of(described(halves[0])), torch.float16) == key(halves[0], torch.float16)

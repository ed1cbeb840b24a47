from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from rayft.data import pack
from rayft.data.pack import Batch, PackedRow, collate, collate_classification, rows_of
from rayft.data.template import IGNORED, Encoded
from rayft.errors import DataError
from rayft.models.attention import dense_mask
from rayft.numerics import assert_close, generator, relative_error, tolerance

VOCABULARY = 50
LAYERS = 2
HIDDEN = 32


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).double().eval()


def made(*lengths: int) -> list[Encoded]:
    random = generator("pack", lengths)
    found = []
    for length in lengths:
        ids = tuple(torch.randint(1, VOCABULARY, (length,), generator=random).tolist())
        prompt = length // 2
        found.append(Encoded(ids, (IGNORED,) * prompt + ids[prompt:]))
    return found


def loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    mask = dense_mask(batch.offsets, *batch.input_ids.shape)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask).logits
    chosen = logits.flatten(0, 1)[batch.completion_index]
    return functional.cross_entropy(chosen, batch.targets, reduction="sum")


def separate_loss(model: LlamaForCausalLM, examples: list[Encoded]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        total += functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum")
    return total


def test_each_example_is_put_into_the_first_row_with_room():
    rows = rows_of(made(6, 5, 4, 3, 2), 10)
    assert [[len(example) for example in row.examples] for row in rows] == [[6, 4], [5, 3, 2]]
    assert len(rows_of([], 10)) == 0


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 100])
def test_each_of_many_examples_is_put_into_the_first_row_with_room(length):
    random = generator("pack", length)
    sizes = torch.randint(1, length + 1, (700,), generator=random).tolist()
    expected: list[list[int]] = []
    for size in sizes:
        row = next((row for row in expected if sum(row) + size <= length), None)
        if row is None:
            expected.append([size])
        else:
            row.append(size)
    rows = rows_of([Encoded((1,) * size, (1,) * size) for size in sizes], length)
    assert [[len(example) for example in row.examples] for row in rows] == expected


def lines_of_packing(count: int, length: int) -> int:
    """Return how many lines of the packing run, comprehensions included, for examples of random lengths."""
    sizes = torch.randint(1, length + 1, (count,), generator=generator("pack", count)).tolist()
    encoded = [Encoded((1,) * size, (1,) * size) for size in sizes]
    lines, before = 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename != pack.__file__:
            return None
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        rows_of(encoded, length)
    finally:
        sys.settrace(before)
    return lines


def test_the_time_of_packing_grows_as_the_number_of_examples_does():
    few, many = (lines_of_packing(count, 256) for count in (500, 2000))
    # Looking at all rows for each example would take 16 times as many.
    assert 2000 < few < many < 6 * few


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(DataError, match="example 2 has 11 tokens, a row 10"):
        rows_of(made(3, 11), 10)


def test_positions_restart_in_each_example():
    examples = made(3, 2)
    row = PackedRow(tuple(examples))
    batch = collate([row, PackedRow(tuple(made(1)))], 0)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0] * 8]
    assert batch.input_ids[0].tolist() == [*examples[0].input_ids, *examples[1].input_ids, 0, 0, 0]
    assert len(row) == 5
    assert {tensor.dtype for tensor in (batch.position_ids, batch.input_ids, batch.targets)} == {torch.int64}


def test_the_mask_is_that_of_the_drawing():
    batch = collate([PackedRow(tuple(made(3, 2))), PackedRow(tuple(made(7)))], pad_id=0)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:3, :3] = torch.ones(3, 3).tril().bool()
    expected[3:5, 3:5] = torch.ones(2, 2).tril().bool()
    expected[5:, 5:] = torch.ones(3, 3).tril().bool()
    mask = dense_mask(batch.offsets, *batch.input_ids.shape)
    assert torch.equal(mask[0, 0], expected)
    assert mask.shape == (2, 1, 8, 8)
    assert mask.any(-1).all()
    assert batch.offsets.tolist() == [0, 3, 5, 8, 15, 16]
    fixed = collate([PackedRow(tuple(made(3, 2)))], 0, width=8, segments=6)
    assert fixed.offsets.tolist() == [0, 3, 5, 8, 8, 8, 8]
    assert batch.input_ids[0].tolist()[5:] == [0, 0, 0]


def test_one_row_is_not_padded_and_several_are_padded_to_eight():
    assert collate([PackedRow(tuple(made(7)))], 0).input_ids.shape == (1, 7)
    assert collate([PackedRow(tuple(made(9))), PackedRow(tuple(made(3)))], 0).input_ids.shape == (2, 16)


def test_targets_are_the_learnt_tokens_in_order():
    examples = made(5, 4, 6)
    batch = collate(rows_of(examples, 9), 0)
    rows = rows_of(examples, 9)
    expected = [
        label for row in rows for example in row.examples for label in example.labels if label != IGNORED
    ]
    assert batch.targets.tolist() == expected
    assert torch.equal(batch.input_ids.flatten()[batch.completion_index + 1], batch.targets)


def test_the_first_token_of_an_example_is_never_a_target():
    ids = (3, 4, 5)
    batch = collate([PackedRow((Encoded(ids, ids), Encoded(ids, ids)))], 0)
    assert batch.completion_index.tolist() == [0, 1, 3, 4]


def test_packed_loss_is_the_sum_of_the_separate_losses(model):
    examples = made(6, 9, 4, 11, 5)
    batch = collate(rows_of(examples, 20), 0)
    expected = separate_loss(model, examples)
    depth = 16 * LAYERS
    assert_close(loss(model, batch), expected, torch.float64, VOCABULARY * HIDDEN, depth)

    # What the mask and the positions are for: without either the loss is another one.
    allowed = tolerance(torch.float64, VOCABULARY * HIDDEN, depth)
    width = batch.input_ids.shape[1]
    whole = torch.arange(0, batch.input_ids.numel() + 1, width, dtype=torch.int32)
    running = torch.arange(width).expand_as(batch.position_ids)
    leaky = dataclasses.replace(batch, offsets=whole)
    assert relative_error(loss(model, leaky), expected) > 1e6 * allowed
    # Rotary positions are relative, so only the mask decides; both together must differ as well.
    both = dataclasses.replace(batch, offsets=whole, position_ids=running)
    assert relative_error(loss(model, both), expected) > 1e6 * allowed


def test_padding_does_not_change_the_loss(model):
    examples = made(3, 17)
    alone = loss(model, collate([PackedRow((examples[0],))], 0)) + loss(
        model, collate([PackedRow((examples[1],))], 0)
    )
    together = collate([PackedRow((example,)) for example in examples], 0)
    assert_close(loss(model, together), alone, torch.float64, VOCABULARY * HIDDEN, 16 * LAYERS)


def test_classification_is_padded_with_a_plain_mask():
    rows = [
        PackedRow((Encoded((5, 6, 7), (IGNORED,) * 3, label=1),)),
        PackedRow((Encoded((8,), (IGNORED,), label=0),)),
    ]
    batch = collate_classification(rows, pad_id=9).to("cpu")
    assert batch.input_ids.tolist()[1] == [8] + [9] * 7
    assert batch.attention_mask.sum(1).tolist() == [3, 1]
    assert batch.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match="an example without a class"):
        collate_classification([PackedRow(tuple(made(3)))], 0)


def test_all_tensors_of_a_batch_are_moved():
    batch = collate([PackedRow(tuple(made(5)))], 0).to("meta")
    assert {getattr(batch, field.name).device.type for field in dataclasses.fields(batch)} == {"meta"}

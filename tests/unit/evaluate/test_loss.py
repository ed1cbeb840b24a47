"""The losses of single targets, and their sum."""

from __future__ import annotations

import torch

from rayft.data.example import Example, Message
from rayft.data.pack import collate_rows, rows_of
from rayft.data.template import encode_all
from rayft.evaluate.loss import batch_loss, target_losses
from rayft.models.attention import dense_mask
from rayft.numerics import assert_close


def test_the_losses_of_targets_are_those_of_their_logits_and_sum_to_the_batchs(tiny_model, tiny_tokenizer):
    examples = [
        Example(messages=(Message("user", "a" * n), Message("assistant", "bc" * n))) for n in (1, 5, 3)
    ]
    batch = collate_rows(rows_of(encode_all(examples, tiny_tokenizer, 64), 64), 0)
    losses = target_losses(tiny_model, batch)
    assert losses.shape == batch.targets.shape
    assert losses.dtype == torch.float32
    mask = dense_mask(batch.offsets, *batch.input_ids.shape)
    logits = tiny_model(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids
    ).logits
    chosen = logits.flatten(0, 1)[batch.completion_index].log_softmax(-1)
    expected = -chosen.gather(1, batch.targets[:, None]).squeeze(1)
    # Two layers, each about eight products deep.
    assert_close(losses, expected, torch.float32, 64, depth=16)
    total, count = batch_loss(tiny_model, batch)
    assert count == len(losses)
    assert_close(losses.sum(), total, torch.float32, count)
    doubled = target_losses(tiny_model, batch, lambda **given: tiny_model(**given))
    assert torch.equal(doubled, losses)

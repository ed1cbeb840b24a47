from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rayft.analysis.gap import example_losses, gap, sample
from rayft.data.pack import PackedRow, collate_rows
from rayft.data.template import IGNORED, Encoded
from rayft.errors import ReportError
from rayft.evaluate.loss import mean_loss
from rayft.models.load import ModelConfig, load_model
from rayft.numerics import tolerance


def encoded(length: int, learnt: int, start: int) -> Encoded:
    ids = [(start + 7 * place) % 250 + 3 for place in range(length)]
    return Encoded(tuple(ids), tuple([IGNORED] * (length - learnt) + ids[length - learnt :]))


def test_each_examples_loss_equals_its_loss_alone(tiny_folder: Path) -> None:
    model = load_model(ModelConfig(name=str(tiny_folder)), torch.float32).model
    examples = [
        encoded(length, learnt, length) for length, learnt in ((9, 2), (21, 5), (14, 1), (30, 12), (8, 3))
    ]
    alone = []
    for example in examples:
        total, count = mean_loss(model, [collate_rows([PackedRow((example,))], 0)])
        alone.append(total / count)
    # Batches of two, the last with one; short rows are padded.
    found = example_losses(model, examples, 0, "cpu", rows=2)
    assert np.max(np.abs(np.array(found) - alone)) <= tolerance(torch.float32, 256, depth=8) * max(alone)


def test_the_gap_of_known_losses_and_its_interval() -> None:
    draw = np.random.default_rng(0)
    train, held_out = draw.normal(1.0, 0.5, 400), draw.normal(1.3, 0.5, 400)
    found = gap([*train], [*held_out], clip=10.0)
    assert found.value == pytest.approx(held_out.mean() - train.mean())
    # The normal interval of a difference of means.
    half = 1.96 * math.sqrt((train.var() + held_out.var()) / 400)
    assert abs(found.high - found.value - half) < 0.1 * half
    assert abs(found.value - found.low - half) < 0.1 * half
    assert found.n == 400


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw, held = np.random.default_rng(1), 0
    for _ in range(60):
        found = gap([*draw.exponential(1.0, 80)], [*draw.exponential(1.2, 80)], clip=100.0)
        held += found.low <= 0.2 <= found.high
    # 95 % of 60 is 57; fewer than 51 has a probability below 1 %.
    assert held >= 51


def test_outliers_and_nan_count_as_the_clip() -> None:
    found = gap([0.0, 0.0], [1e9, math.nan], clip=4.0)
    assert (found.train, found.held_out) == (0.0, 4.0)
    assert gap([0.0, 1.0], [0.0, math.inf], clip=4.0).held_out == 2.0


@pytest.mark.parametrize(("train", "held_out"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_samples_must_have_equal_sizes_of_two_or_more(train: list[float], held_out: list[float]) -> None:
    with pytest.raises(ReportError, match="a gap needs equal numbers of both, two or more"):
        gap(train, held_out, 10.0)


def test_a_sample_is_the_same_for_a_seed_and_has_nothing_twice() -> None:
    numbers = [*range(50)]
    one = sample(numbers, 20, 0, "train")
    assert one == sample(numbers, 20, 0, "train") != sample(numbers, 20, 1, "train")
    assert len(set(one)) == 20
    assert sorted(sample(numbers, 99, 0)) == numbers

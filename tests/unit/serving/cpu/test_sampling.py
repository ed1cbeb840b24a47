from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rayft.serving.engine.cpu.sampling import Draw, Seen, choose, uniform

LOGITS = torch.tensor([[0.0, 2.0, 1.0, -3.0]])


def test_temperature_zero_takes_the_likeliest() -> None:
    assert choose(LOGITS.repeat(3, 1), [Draw(0.0, 1.0, u) for u in (0.0, 0.5, 0.99)]).tolist() == [1, 1, 1]


def test_draws_follow_the_distribution() -> None:
    n = 2000
    draws = [Draw(0.7, 1.0, (i + 0.5) / n) for i in range(n)]
    counts = Counter(choose(LOGITS.repeat(n, 1), draws).tolist())
    wanted = (LOGITS[0] / 0.7).softmax(0)
    # Evenly spread draws: each token's share is exact to one draw at either end.
    assert all(abs(counts[token] - n * wanted[token].item()) <= 2 for token in range(4))


def test_top_p_keeps_the_token_that_reaches_it_and_no_more() -> None:
    n, share = 500, LOGITS[0].softmax(0)
    two = (share[1] + share[2]).item()
    for top_p, kept in ((share[1].item() / 2, {1}), (two - 0.01, {1, 2}), (two + 0.01, {0, 1, 2})):
        draws = [Draw(1.0, top_p, i / n) for i in range(n)]
        assert set(choose(LOGITS.repeat(n, 1), draws).tolist()) == kept


def test_each_row_has_its_own_options() -> None:
    logits = torch.randn(4, 11)
    draws = [Draw(0.0, 1.0, 0.3), Draw(1.5, 1.0, 0.9), Draw(1.0, 0.5, 0.2), Draw(0.2, 0.9, 0.6)]
    together = choose(logits, draws).tolist()
    alone = [choose(logits[i : i + 1], [draw]).item() for i, draw in enumerate(draws)]
    assert together == alone


def seen(tokens: Sequence[int], *since: int) -> Seen:
    found = Seen(tokens)
    found.mask(VOCABULARY)
    for token in since:
        found.add(token)
    return found


OPTIONS = [
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 10**6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.4},
    {"top_k": 5, "top_p": 0.6},
    {"min_p": 0.05, "top_p": 0.8},
    {"top_k": 7, "min_p": 0.02, "top_p": 0.9, "repetition_penalty": 1.3},
    {"top_k": 7, "min_p": 0.02, "top_p": 0.9, "repetition_penalty": 1.3, "temperature": 0.4},
    {"top_p": 0.7, "repetition_penalty": 1.5, "temperature": 1.8},
]
VOCABULARY = 23


def processed(logits_V: torch.Tensor, tokens: Sequence[int], options: dict[str, Any]) -> torch.Tensor:
    """The distribution that transformers draws from, its processors put into vLLM's order."""
    processors = LogitsProcessorList([
        RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0)),
        TemperatureLogitsWarper(float(options.get("temperature", 1.0))),
        MinPLogitsWarper(options.get("min_p", 0.0)),
        TopKLogitsWarper(options.get("top_k", VOCABULARY)),
        TopPLogitsWarper(options.get("top_p", 1.0)),
    ])  # fmt: skip
    scores: torch.Tensor = processors(torch.tensor([tokens]), logits_V[None].clone())
    return scores[0].softmax(dim=-1)


def draws_of(options: dict[str, Any], points: Sequence[float], tokens: Seen) -> list[Draw]:
    penalty = options.get("repetition_penalty", 1.0)
    first = Draw(1.0, 1.0, 0.0, seen=tokens if penalty != 1 else None)
    return [replace(first, **{**options, "uniform": point}) for point in points]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_drawn_from_is_what_transformers_draws_from(options: dict[str, Any]) -> None:
    logits, tokens, n = 2 * torch.randn(VOCABULARY), [3, 3, 8, 20, 1, 14, 9], 4000
    wanted = processed(logits, tokens, options)
    draws = draws_of(options, [(i + 0.5) / n for i in range(n)], seen(tokens[:4], *tokens[4:]))
    counts = Counter(choose(logits.repeat(n, 1), draws).tolist())
    assert set((wanted > 1 / n).nonzero().flatten().tolist()) <= set(counts)
    assert all(wanted[token] > 0 for token in counts)
    assert all(abs(counts[token] - n * wanted[token].item()) <= 2 for token in range(VOCABULARY))


def test_the_likeliest_token_is_taken_after_the_penalty() -> None:
    logits, tokens = torch.randn(6, VOCABULARY), [[i, i + 1, 2 * i] for i in range(6)]
    penalty = {"temperature": 0.0, "repetition_penalty": 5.0}
    draws = [draws_of(penalty, [0.0], seen(row))[0] for row in tokens]
    processor = RepetitionPenaltyLogitsProcessor(5.0)
    wanted = [
        processor(torch.tensor([row]), logits[i : i + 1]).argmax().item() for i, row in enumerate(tokens)
    ]
    assert choose(logits, draws).tolist() == wanted
    assert wanted != logits.argmax(dim=-1).tolist()


def test_equally_likely_tokens_stay_or_go_together() -> None:
    logits = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0]).repeat(300, 1)
    points = [i / 300 for i in range(300)]
    for options in ({"top_k": 3}, {"min_p": 0.1}):
        assert set(choose(logits, draws_of(options, points, seen([]))).tolist()) == {0, 1, 2, 3, 4}
    assert set(choose(logits, draws_of({"top_k": 2}, points, seen([]))).tolist()) == {1, 3}


def test_a_rows_choice_is_the_same_bit_for_bit_in_any_batch() -> None:
    size, n = 4099, 60
    logits = torch.randn(n, size).to(torch.bfloat16)
    rows = [{}, {"temperature": 0.0}, {"top_p": 0.9}, *OPTIONS]
    draws = []
    for row in range(n):
        tokens = Seen(torch.randint(size, (50,)).tolist())
        draws += draws_of({"temperature": 1.3, **rows[row % len(rows)]}, [random.random()], tokens)
    together = choose(logits, draws).tolist()
    assert together == [choose(logits[i : i + 1], [draw]).item() for i, draw in enumerate(draws)]
    plain = [row for row, draw in enumerate(draws) if draw.seen is None and not draw.top_k and not draw.min_p]
    assert choose(logits[plain], [draws[row] for row in plain]).tolist() == [together[row] for row in plain]


def test_extreme_options_are_no_trouble() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 0.0, 1.0]])
    draws = [Draw(1e-6, 1.0, 0.999999), Draw(2.0, 1.0, 0.0)]
    assert choose(logits, draws).tolist() == [0, 2]
    assert choose(logits, [Draw(1.0, 1e-9, 0.9999), Draw(1.0, 1.0, 0.999999)]).tolist() == [0, 1]
    assert choose(logits, [Draw(1e-300, 1.0, 0.5), Draw(1.0, 1e-300, 0.5)]).tolist() == [0, 2]
    both = [Draw(1e-300, 1.0, 0.9, 1, 1.0), Draw(2.0, 1e-300, 0.9, 2**62, 1e-300)]
    assert choose(logits, both).tolist() == [0, 2]
    penalty = [
        Draw(0.0, 1.0, 0.0, 0, 0.0, 100.0, Seen([0, 1, 2])),
        Draw(1.0, 1.0, 0.5, 0, 0.0, 0.01, Seen([0])),
    ]
    assert choose(logits, penalty).tolist() == [0, 2]


def test_a_row_of_nan_gives_some_token() -> None:
    logits = torch.full((2, 5), torch.nan)
    logits[1] = torch.arange(5)
    for options in ((), (2, 0.1), (0, 0.0, 2.0, Seen([1]))):
        chosen = choose(logits, [Draw(1.0, 0.9, 0.5, *options), Draw(0.0, 1.0, 0.5)]).tolist()
        assert 0 <= chosen[0] < 5
        assert chosen[1] == 4


def test_the_draw_depends_on_seed_and_step_only() -> None:
    assert uniform(3, 4) == uniform(3, 4)
    drawn = {uniform(seed, step) for seed in range(5) for step in range(5)}
    assert len(drawn) == 25
    assert all(0 <= u < 1 for u in drawn)

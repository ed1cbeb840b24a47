from __future__ import annotations

from collections import Counter

import torch

from rayft.serving.sampling import Draw, choose, uniform

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


def test_extreme_options_are_no_trouble() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 0.0, 1.0]])
    draws = [Draw(1e-6, 1.0, 0.999999), Draw(2.0, 1.0, 0.0)]
    assert choose(logits, draws).tolist() == [0, 2]
    assert choose(logits, [Draw(1.0, 1e-9, 0.9999), Draw(1.0, 1.0, 0.999999)]).tolist() == [0, 1]
    assert choose(logits, [Draw(1e-300, 1.0, 0.5), Draw(1.0, 1e-300, 0.5)]).tolist() == [0, 2]


def test_a_row_of_nan_gives_some_token() -> None:
    logits = torch.full((2, 5), torch.nan)
    logits[1] = torch.arange(5)
    chosen = choose(logits, [Draw(1.0, 0.9, 0.5), Draw(0.0, 1.0, 0.5)]).tolist()
    assert 0 <= chosen[0] < 5
    assert chosen[1] == 4


def test_the_draw_depends_on_seed_and_step_only() -> None:
    assert uniform(3, 4) == uniform(3, 4)
    drawn = {uniform(seed, step) for seed in range(5) for step in range(5)}
    assert len(drawn) == 25
    assert all(0 <= u < 1 for u in drawn)

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from rayft.errors import DataError
from rayft.evaluate.compare import Z, interval, over_seeds, paired
from rayft.numerics import assert_close


def close(actual: float, expected: float, terms: int) -> None:
    assert_close(torch.tensor([actual]).double(), torch.tensor([expected]).double(), torch.float32, terms)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (1, 7), (50, 100), (84, 100), (3, 1000)])
def test_the_wilson_interval_is_scipys(right, n):
    expected = binomtest(right, n).proportion_ci(method="wilson")
    low, high = interval([1.0] * right + [0.0] * (n - right))
    close(low, expected.low, n)
    close(high, expected.high, n)
    assert 0 <= low <= right / n <= high <= 1


def test_the_bootstrap_interval_covers_the_mean_in_about_95_percent_of_cases():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(60):
        low, high = interval(rng.beta(2, 3, size=40).tolist())
        hits += low <= 0.4 <= high
    # 95% of 60 is 57; fewer than 50 has a probability of 1e-4.
    assert hits >= 50
    many = np.linspace(0.2, 0.9, 40).tolist()
    assert interval(many) == interval(many)


@pytest.mark.parametrize("n", [1, 3, 8, 19])
def test_the_interval_of_few_partial_scores_is_no_narrower_than_it_should_be(n):
    rng = np.random.default_rng(4)
    intervals = [interval(rng.beta(2, 3, size=n).tolist()) for _ in range(200)]
    # 95% of 200 is 190.
    assert sum(low <= 0.4 <= high for low, high in intervals) >= 190


def test_equal_partial_scores_have_an_interval():
    low, high = interval([0.5] * 100)
    assert (low, high) == interval([1.0, 0.0] * 50)


def test_the_bootstrap_interval_is_the_normal_one_for_large_n():
    values = np.random.default_rng(0).uniform(size=4000)
    low, high = interval(values.tolist())
    width = 2 * 1.96 * values.std() / np.sqrt(len(values))
    assert 0.9 * width < high - low < 1.1 * width


def test_mcnemars_p_value_equals_one_computed_by_hand():
    # 5 items are right only in the first, 1 only in the second: p = 2·(C(6,0) + C(6,1))/2⁶ = 14/64.
    first = [1, 1, 1, 1, 1, 0, 1, 0]
    second = [0, 0, 0, 0, 0, 1, 1, 0]
    found = paired(first, second)
    close(found.p_value, 14 / 64, 8)
    close(found.difference, 4 / 8, 8)
    assert found.ci_low <= found.difference <= found.ci_high
    turned = paired(second, first)
    close(turned.difference, -4 / 8, 8)
    close(turned.p_value, 14 / 64, 8)


def test_equal_models_do_not_differ():
    found = paired([1, 0, 1], [1, 0, 1])
    assert (found.difference, found.p_value) == (0, 1)
    # The score test of no discordant item: n·x² ≤ Z²·|x|·(1 − |x|), so |x| ≤ Z²/(n + Z²).
    close(found.ci_high, Z**2 / (3 + Z**2), 3)
    close(found.ci_low, -found.ci_high, 3)
    assert paired([0.5, 0.2], [0.5, 0.2]).p_value == 1


@pytest.mark.parametrize(
    ("first", "second", "count"), [(1, 0, 1), (1, 0, 3), (0, 1, 3), (0.8, 0.3, 5), (0.5, 0.2, 2)]
)
def test_an_interval_of_few_equal_differences_excludes_no_more_than_the_p_value(first, second, count):
    found = paired([first] * count, [second] * count)
    assert found.p_value > 0.05
    assert -1 <= found.ci_low < 0 < found.ci_high <= 1 or abs(found.difference) == found.ci_high
    assert found.ci_low < 0 < found.ci_high
    turned = paired([second] * count, [first] * count)
    close(turned.ci_low, -found.ci_high, count)
    close(turned.ci_high, -found.ci_low, count)


@pytest.mark.parametrize(("better", "worse", "n"), [(5, 1, 8), (12, 2, 50), (7, 7, 60), (1, 9, 30)])
def test_the_interval_of_a_difference_ends_where_the_score_test_rejects(better, worse, n):
    same = [1] * (n - better - worse)
    found = paired([1] * better + [0] * worse + same, [0] * better + [1] * worse + same)

    def statistic(x):
        # The most likely share of items on which the second alone is right, if the mean difference is x.
        shares = np.linspace(max(0, -x), (1 - x) / 2, 200_003)[1:-1]
        chance = better * np.log(shares + x) + worse * np.log(shares) + len(same) * np.log(1 - 2 * shares - x)
        share = shares[chance.argmax()]
        return abs(better - worse - n * x) / np.sqrt(n * (2 * share + x * (1 - x)))

    step = (found.ci_high - found.ci_low) / 1000
    assert max(statistic(found.ci_low + step), statistic(found.ci_high - step)) < Z
    assert min(statistic(found.ci_low - step), statistic(found.ci_high + step)) > Z


def test_a_difference_that_is_nan_has_no_interval():
    found = paired([1.0, 0.5, 1.0], [float("nan")] * 3)
    assert np.isnan([found.difference, found.ci_low, found.ci_high]).all()


@pytest.mark.parametrize("n", [5, 10, 19, 60])
def test_the_interval_of_a_difference_covers_it_in_about_95_percent_of_cases(n):
    rng = np.random.default_rng(6)
    pairs = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])
    hits = 0
    for _ in range(400):
        one, other = pairs[rng.choice(4, p=[0.3, 0.1, 0.3, 0.3], size=n)].T
        found = paired(one.tolist(), other.tolist())
        hits += found.ci_low <= 0.2 <= found.ci_high
    # 95% of 400 is 380, with a standard deviation of 4.4.
    assert hits >= 366


@pytest.mark.parametrize("n", [3, 8, 19])
def test_the_interval_of_few_partial_differences_is_no_narrower_than_it_should_be(n):
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        found = paired(rng.beta(3, 2, size=n).tolist(), rng.beta(2, 3, size=n).tolist())
        hits += found.ci_low <= 0.2 <= found.ci_high
    assert hits >= 190


def test_the_sign_flip_p_value_equals_one_computed_by_hand():
    # Differences .1, .2, .3: of 8 sign patterns only +++ and --- reach a sum of .6.
    close(paired([0.5, 0.5, 0.5], [0.4, 0.3, 0.2]).p_value, 2 / 8, 8)
    # .1, .2, -.3 sum to 0, which every pattern reaches.
    close(paired([0.5, 0.5, 0.2], [0.4, 0.3, 0.5]).p_value, 1.0, 8)


def test_sampled_sign_flips_agree_with_the_normal_approximation():
    rng = np.random.default_rng(1)
    difference = rng.normal(0.02, 0.1, size=200)
    base = rng.uniform(0.3, 0.6, size=200)
    found = paired((base + difference).tolist(), base.tolist())
    from scipy.stats import norm

    expected = 2 * norm.sf(abs(difference.sum()) / np.sqrt((difference**2).sum()))
    # Four standard errors of a share of 10,000 draws.
    assert abs(found.p_value - expected) < 4 * np.sqrt(expected / 10_000) + 1 / 10_000


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(2)
    items = rng.uniform(size=300)
    better = np.clip(items + 0.03, 0, 1)
    found = paired(better.tolist(), items.tolist())
    low, high = interval(items.tolist())
    assert found.ci_high - found.ci_low < 0.2 * (high - low)
    assert found.p_value < 0.01


def test_scores_of_different_numbers_of_items_are_refused():
    with pytest.raises(DataError, match="2 and 3 scores can't be paired"):
        paired([1, 0], [1, 0, 1])
    with pytest.raises(DataError, match="no scores"):
        interval([])


def drawn(rng, seeds, items, spread, shift=0.0):
    """Scores with an effect of each item, of each seed, and noise."""
    effects = rng.normal(size=items) + shift
    return effects, effects + spread * rng.normal(size=(seeds, 1)) + 0.3 * rng.normal(size=(seeds, items))


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_an_interval_over_seeds_covers_the_mean_whichever_effect_varies(spread):
    # With only 3 seeds, the coverage is a few points too low where seeds vary most, because the tails of a
    # t-distribution are missing.
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(50):
        found = over_seeds([drawn(rng, 3, 60, spread)[1], drawn(rng, 3, 60, spread)[1]])
        hits += found.ci_low <= 0 <= found.ci_high
    assert hits >= (43 if spread < 1 else 36)


def test_two_methods_are_paired_by_items_and_not_by_seeds():
    rng = np.random.default_rng(6)
    effects, one = drawn(rng, 3, 100, 0.0)
    other = effects + 0.3 * rng.normal(size=(3, 100)) + 0.5
    found = over_seeds([one], [other])
    assert found.ci_low < -0.5 < found.ci_high < 0
    alone = over_seeds([one])
    assert found.ci_high - found.ci_low < alone.ci_high - alone.ci_low
    # With one bad seed of the first method, the difference is no longer significant.
    unsure = over_seeds([one + np.array([[0.0], [0.0], [3.0]])], [other])
    assert unsure.ci_low < 0 < unsure.ci_high


def test_the_same_scores_do_not_differ_and_seeds_may_be_one():
    scores = np.random.default_rng(7).integers(0, 2, (1, 50)).astype(float)
    same = over_seeds([scores], [scores])
    assert same.value == 0.0
    assert same.ci_low < 0 < same.ci_high


def test_one_seed_of_one_task_has_the_interval_of_its_scores():
    one, other = np.random.default_rng(8).integers(0, 2, (2, 1, 50)).astype(float)
    alone, difference = over_seeds([one]), over_seeds([one], [other])
    assert (alone.ci_low, alone.ci_high) == interval(one[0].tolist())
    found = paired(one[0].tolist(), other[0].tolist())
    assert (difference.ci_low, difference.ci_high) == (found.ci_low, found.ci_high)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_over_seeds_of_equal_scores_is_not_a_point(seeds):
    wrong, right = np.zeros((seeds, 16)), np.ones((seeds, 16))
    assert over_seeds([wrong]).ci_high == interval([0.0] * 16)[1] > 0.1
    assert over_seeds([right]).ci_low == interval([1.0] * 16)[0] < 0.9
    same = over_seeds([wrong], [wrong])
    assert same.ci_low < -0.1 < 0.1 < same.ci_high


@pytest.mark.parametrize(
    ("first", "second"), [([], None), ([np.ones((2, 3))], [np.ones((2, 4))]), ([np.ones(3)], None)]
)
def test_scores_that_do_not_fit_together_over_seeds_are_refused(first, second):
    with pytest.raises(DataError):
        over_seeds(first, second)

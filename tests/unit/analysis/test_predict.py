from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import kendalltau, pearsonr, rankdata, spearmanr

from rayft.analysis import predict
from rayft.analysis.predict import Run, correlations
from rayft.errors import ReportError
from rayft.numerics import derive_seed


def runs(gaps: list[float], groups: int | None = None, **measures: list[float]) -> list[Run]:
    return [
        Run(
            str(index % (groups or len(gaps))),
            gap,
            {name: values[index] for name, values in measures.items()},
        )
        for index, gap in enumerate(gaps)
    ]


def test_perfect_and_reversed_order_correlate_by_1_and_minus_1() -> None:
    gaps = [0.1, 0.4, 0.2, 0.9, 0.5, 0.7]
    found = {
        c.measure: c for c in correlations(runs(gaps, same=[g**3 for g in gaps], against=[-g for g in gaps]))
    }
    for name, sign in (("same", 1.0), ("against", -1.0)):
        one = found[name]
        ends = (one.kendall_low, one.kendall_high, one.spearman_low, one.spearman_high)
        assert (one.kendall, one.spearman, *ends) == pytest.approx((sign,) * 6)
        assert (one.n, one.groups) == (6, 6)


def test_correlations_equal_counted_pairs_and_squared_rank_differences() -> None:
    draw = np.random.default_rng(3)
    x, y = draw.normal(size=9), draw.normal(size=9)
    (found,) = correlations(runs([*y], m=[*x]))
    signs = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in itertools.combinations(range(9), 2)]
    assert found.kendall == pytest.approx(np.mean(signs))
    ranks = [values.argsort().argsort() for values in (x, y)]
    assert found.spearman == pytest.approx(1 - 6 * np.sum((ranks[0] - ranks[1]) ** 2) / (9 * 80))


def test_with_ties_correlations_equal_scipys() -> None:
    draw = np.random.default_rng(4)
    x, y, held = draw.integers(0, 4, 30), draw.integers(0, 5, 30), draw.integers(0, 6, 30)
    given = [
        Run(str(i), float(y[i]), {"m": float(x[i])}, float(held[i] - y[i]), float(held[i])) for i in range(30)
    ]
    (found,) = correlations(given)
    assert found.kendall == pytest.approx(kendalltau(x, y).statistic)
    assert found.spearman == pytest.approx(spearmanr(x, y).statistic)
    assert found.held_out == pytest.approx(spearmanr(x, held).statistic)
    # A partial correlation is that of what a regression on the third leaves of the other two.
    ranks = [rankdata(each) for each in (x, y, held - y)]
    rest = [each - np.polyval(np.polyfit(ranks[2], each, 1), ranks[2]) for each in ranks[:2]]
    assert found.partial == pytest.approx(pearsonr(*rest).statistic)
    ends = [
        (found.kendall_low, found.kendall, found.kendall_high),
        (found.partial_low, found.partial, found.partial_high),
        (found.held_out_low, found.held_out, found.held_out_high),
    ]
    assert all(low < value < high for low, value, high in ends)


def test_intervals_are_quantiles_over_resamples_of_any_length() -> None:
    draw = np.random.default_rng(6)
    # Settings of one, two and three seeds: resamples differ in length.
    groups = [str(group) for group in range(9) for _ in range(1 + group % 3)]
    x, y = draw.normal(size=(2, len(groups)))
    given = [Run(group, gap, {"m": value}) for group, gap, value in zip(groups, y, x, strict=True)]
    (found,) = correlations(given)
    members = [np.flatnonzero(np.array(groups) == group) for group in dict.fromkeys(groups)]
    rng, drawn = np.random.default_rng(derive_seed("correlate", "m", 0)), []
    for _ in range(predict.RESAMPLES):
        rows = np.concatenate([members[i] for i in rng.integers(0, 9, 9)])
        drawn.append((kendalltau(x[rows], y[rows]).statistic, spearmanr(x[rows], y[rows]).statistic))
    ends = np.quantile(drawn, [0.025, 0.975], axis=0).T
    assert (found.kendall_low, found.kendall_high) == pytest.approx(ends[0])
    assert (found.spearman_low, found.spearman_high) == pytest.approx(ends[1])
    assert math.isnan(found.partial)
    assert math.isnan(found.held_out_low)


def test_many_runs_are_compared_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(8)
    gaps = draw.normal(size=12)
    given = runs([*gaps], m=[*(gaps + draw.normal(size=12))])
    whole = correlations(given)[0].model_dump()
    monkeypatch.setattr(predict, "AT_ONCE", 500)
    assert correlations(given)[0].model_dump() == pytest.approx(whole, nan_ok=True)


def test_what_follows_the_training_loss_alone_says_nothing_beyond_it() -> None:
    draw = np.random.default_rng(9)
    further = draw.normal(size=60)
    held = draw.normal(size=60) / 4
    given = [
        Run(str(i), held[i] + further[i], {"norm": further[i] + draw.normal() / 10}, -further[i], held[i])
        for i in range(60)
    ]
    (found,) = correlations(given)
    assert found.spearman_low > 0.8
    assert found.partial_low < 0 < found.partial_high
    assert found.held_out_low < 0 < found.held_out_high


def test_few_settings_give_no_interval_however_perfect_their_order() -> None:
    (found,) = correlations(runs([0.1, 0.2, 0.3, 0.4, 0.5], m=[1.0, 2.0, 3.0, 4.0, 5.0]))
    assert found.spearman == pytest.approx(1.0)
    assert math.isnan(found.spearman_low)
    assert math.isnan(found.kendall_high)
    # Ten seeds of two settings are two.
    (found,) = correlations(runs([0.1 * i for i in range(10)], groups=2, m=[float(i) for i in range(10)]))
    assert found.groups == 2
    assert math.isnan(found.spearman_low)


def test_noise_and_signal_are_distinguished() -> None:
    draw = np.random.default_rng(5)
    gaps = draw.normal(size=40)
    found = {
        one.measure: one
        for one in correlations(
            runs([*gaps], noise=[*draw.normal(size=40)], signal=[*(gaps + draw.normal(0, 0.5, 40))])
        )
    }
    assert found["noise"].spearman_low < 0 < found["noise"].spearman_high
    assert found["signal"].spearman_low > 0.5
    assert found["signal"].kendall_low > 0.3


def test_seeds_of_one_setting_count_as_one() -> None:
    draw = np.random.default_rng(7)
    setting, seeds = 8, 5
    x = np.repeat(draw.normal(size=setting), seeds)
    y = np.repeat(draw.normal(size=setting), seeds) + draw.normal(0, 0.01, setting * seeds)

    def width(groups: list[str]) -> float:
        (one,) = correlations([Run(g, gap, {"m": m}) for g, gap, m in zip(groups, y, x, strict=True)])
        return one.spearman_high - one.spearman_low

    apart = [str(i) for i in range(setting * seeds)]
    together = [str(i // seeds) for i in range(setting * seeds)]
    assert width(together) > 1.5 * width(apart)


def test_measures_that_are_missing_or_constant_are_left_out() -> None:
    found = correlations(
        runs(
            [0.1, 0.2, 0.3, 0.5],
            constant=[1.0] * 4,
            broken=[math.nan, math.inf, 1.0, 2.0],
            good=[1.0, 3.0, 2.0, 4.0],
        )
    )
    assert [one.measure for one in found] == ["good"]
    assert not correlations(runs([0.2, 0.2, 0.2], good=[1.0, 2.0, 3.0]))


def test_a_run_without_a_finite_gap_takes_no_part() -> None:
    gaps = [0.1, 0.4, 0.2, 0.9]
    given = runs([*gaps, math.nan, math.inf], m=[*gaps, 5.0, 0.0])
    (found,) = correlations(given)
    assert (found.spearman, found.n) == (pytest.approx(1.0), 4)
    with pytest.raises(ReportError, match="here are 2"):
        correlations(given[2:])


def test_few_runs_in_perfect_order_come_last() -> None:
    few, nearly, weak = (3.0, 2.0, 1.0), (1.0, 2.0, 3.0, 5.0, 4.0), (1.0, 3.0, 2.0, 4.0, 6.0, 5.0)
    found = correlations(
        runs(
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
            few=[*few, math.nan, math.nan, math.nan], nearly=[*nearly, math.nan], weak=[*weak],
        )
    )  # fmt: skip
    assert [(one.measure, one.n) for one in found] == [("weak", 6), ("nearly", 5), ("few", 3)]
    strengths = [abs(one.spearman) for one in found]
    assert strengths == sorted(strengths)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_runs_are_refused(count: int) -> None:
    with pytest.raises(ReportError, match=f"needs 3 or more finished runs with a gap, and there are {count}"):
        correlations(runs([0.1, 0.2][:count], m=[1.0, 2.0][:count]))

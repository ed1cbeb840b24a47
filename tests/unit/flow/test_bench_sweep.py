"""The benchmark of whole sweeps: how the time of many trials follows from that of some."""

from __future__ import annotations

import pytest

from benchmarks.bench_sweep import whole


def test_the_trials_that_were_not_run_count_with_the_marginal_time() -> None:
    # Four at once: the first round ends after 103 s, and four more trials take 50 s.
    ended = [100.0, 101.0, 102.0, 103.0, 120.0, 140.0, 150.0, 153.0]
    assert whole(ended, 4, 16) == 103 + 12 * 50 / 4
    assert whole([60.0, 100.0, 140.0], 1, 16) == 60 + 15 * 40


def test_one_round_has_no_marginal_time() -> None:
    with pytest.raises(SystemExit, match="more trials"):
        whole([100.0, 101.0], 2, 16)

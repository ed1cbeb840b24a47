"""The benchmark of whole sweeps: how the time of many trials follows from that of some."""

from __future__ import annotations

from benchmarks.bench_sweep import stages_of, whole


def test_the_trials_that_were_not_run_count_with_the_marginal_time() -> None:
    # Four at once: the first round ends after 103 s, and four more trials take 50 s.
    ended = [100.0, 101.0, 102.0, 103.0, 120.0, 140.0, 150.0, 153.0]
    assert whole(ended, 4, 16) == 103 + 12 * 50 / 4
    assert whole([60.0, 100.0, 140.0], 1, 16) == 60 + 15 * 40


def test_trials_that_all_run_at_once_have_no_marginal_time() -> None:
    assert whole([100.0, 101.0, 104.0, 110.0], 4, 4) == 110


def test_the_seconds_of_a_sweep_are_those_in_its_log_and_those_around_them() -> None:
    said = [
        (4.0, "check, and prepare the data …\n"), (7.5, "  check, and prepare the data: 3.0 s\n"),
        (7.6, "start workers, search (2 trials) …\n"), (20.0, "  lora-r4: step 20  val 3.1  12 steps/s\n"),
        (50.0, "  start workers, search (2 trials): 42.0 s\n"), (58.0, "report: out/report.html\n"),
    ]  # fmt: skip
    assert stages_of(said, 60.0) == {
        "before the first stage": 4.0,
        "check, and prepare the data": 3.0,
        "start workers, search (2 trials)": 42.0,
        "between the stages": 1.0,
        "after the last stage": 10.0,
    }

import math

import pytest

from rayft.report.record import TrialRecord
from rayft.report.table import pareto, table_rows
from rayft.report.text import ago_text, human_bytes, human_count, human_seconds, loss_text
from tests.unit.report.example import example


def test_baselines_first_then_trials_by_score_then_squeezed() -> None:
    found = table_rows(example())
    assert [row.kind for row in found] == ["baseline"] * 4 + ["trial"] * 10 + ["squeezed"] * 4
    scores = [row.test.value for row in found if row.kind == "trial" and row.test]
    assert scores == sorted(scores, reverse=True)
    assert [row.name for row in found if row.kind == "trial" and not row.test] == [
        "c3la-r8",
        "cla-r8",
        "lora-r16-hot",
    ]
    assert [row.name for row in found if row.winner] == ["lora-r32"]
    assert [row.name for row in found if row.ship] == ["lora-r32@r8"]


def test_what_a_failed_trial_did_not_measure_is_not_0() -> None:
    failed = TrialRecord(
        id="t", method="lora", rank=4, alpha=8.0, lr=1.0, seed=0, status="failed", reason="why"
    )
    record = example().model_copy(update={"trials": (failed,), "winner": None, "squeezed": ()})
    (row,) = (row for row in table_rows(record) if row.kind == "trial")
    assert (row.parameters, row.bytes, row.seconds) == (None, None, None)


def test_nothing_beats_the_front_and_the_front_beats_all_else() -> None:
    found = [row for row in table_rows(example()) if row.test and row.bytes]
    front = pareto(found)

    def beats(a: int, b: int) -> bool:
        first, second = found[a], found[b]
        assert first.test
        assert second.test
        assert first.bytes
        assert second.bytes
        no_worse = first.test.value >= second.test.value and first.bytes <= second.bytes
        return no_worse and (first.test.value, first.bytes) != (second.test.value, second.bytes)

    for index, row in enumerate(found):
        beaten = any(beats(other, index) for other in range(len(found)))
        assert (row in front) == (not beaten)
    assert 1 < len(front) < len(found)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1500, "1.5 kB"),
        (2_482_240, "2.48 MB"),
        (3e15, "3e+03 TB"),
    ],
)
def test_sizes(number: float | None, text: str) -> None:
    assert human_bytes(number) == text


def test_times_that_have_passed() -> None:
    assert [ago_text(s) for s in (-5, 59, 60, 7199, 7200, 86399, 86400, 1e8)] == [
        *("just now", "just now", "1 min ago", "1 h ago", "2 h ago", "23 h ago", "1 d ago", "1157 d ago")
    ]


def test_counts_durations_losses() -> None:
    assert [human_count(n) for n in (12, 999_600, 4_884_480)] == ["12", "1M", "4.88M"]
    assert [human_seconds(s) for s in (None, 0.0532, 3.21, 59.97, 185, 7800)] == [
        "–",
        "53 ms",
        "3.2 s",
        "1m 00s",
        "3m 05s",
        "2h 10m",
    ]
    assert [loss_text(x) for x in (None, 1.23456, math.nan, math.inf)] == [
        "–",
        "1.235",
        "diverged",
        "diverged",
    ]

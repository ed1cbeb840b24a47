"""The report in a browser: its one script sorts the tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.report.evaluations import EvaluatedDifference, SavedEvaluation, SavedEvaluations
from rayft.report.record import Score
from rayft.report.render import render
from tests.integration.browser import browser, chromium
from tests.unit.report.example import example
from tests.unit.report.test_render import bare

__all__ = ["bare"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="there is no chromium here (Debian: apt install chromium)"),
]


@pytest.mark.usefixtures("bare")
def test_tables_are_sorted_by_the_size_of_their_numbers(tmp_path: Path) -> None:
    record = example()
    sizes = {
        "parameters": (1_540_000_000, 900_000_000, 5_000),
        "bytes": (3_000_000_000_000, 800, 7_000_000_000),
    }
    rows = [
        record.trials[0].model_copy(update={"id": f"t{n}", "trainable": count, "bytes": size})
        for n, (count, size) in enumerate(zip(*sizes.values(), strict=True))
    ]
    score = Score(value=0.1, low=0.0, high=0.2, n=10)
    differences = tuple(
        EvaluatedDifference(
            target=f"p{n}", against="base", task="test", metric="m", difference=score, p_value=p
        )
        for n, p in enumerate((0.03, 1.2e-9, 0.5))
    )
    evaluation = SavedEvaluation(date="2026-01-01", base="b", scores=(), differences=differences)
    record = record.model_copy(
        update={"trials": tuple(rows), "winner": None, "squeezed": (), "methods": (), "comparisons": ()}
    )
    page = render(record, tmp_path / "report.html", evaluations=SavedEvaluations((evaluation,)))
    binary = chromium()
    assert binary is not None
    with browser(binary, tmp_path / "profile") as tab:
        tab.open(page.as_uri())

        def order(table: str, column: str, first: str) -> list[str]:
            head = f"[...document.querySelectorAll('{table} thead th')].find(h => h.innerText == '{column}')"
            tab.run(f"{head}.querySelector('button').click()")
            names = f"[...document.querySelectorAll('{table} tbody tr')].map(r => r.cells[0].textContent)"
            return [name for name in tab.run(names) if name[1:].isdigit() and name[0] == first]

        results, others = "[aria-labelledby=results]", "[aria-labelledby=evaluated-differences]"
        assert order(results, "parameters", "t") == ["t0", "t1", "t2"]
        assert order(results, "size", "t") == ["t0", "t2", "t1"]
        assert order(others, "p", "p") == ["p2", "p0", "p1"]
        assert not tab.errors

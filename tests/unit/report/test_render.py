"""The page: what it says, that it is whole, and that it needs nothing else."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rayft.report import MethodScore, Score, SweepRecord
from rayft.report.evaluations import EvaluatedScore, SavedEvaluation, SavedEvaluations
from rayft.report.render import html, render
from tests.unit.report.example import example

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A parsed page: tags that were not closed, ids, links to elsewhere, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []
        self.html = text
        self.text = ""
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action") and not (value or "").startswith("#"):
                self.outside.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(html(example()))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a sweep's figures out of the page: they take longer than all else."""
    monkeypatch.setattr("rayft.report.render.sweep_figures", lambda _: [])


def changed(**parts: Any) -> SweepRecord:
    return SweepRecord.model_validate({**example().model_dump(), **parts})


def test_the_page_needs_no_other_file_or_server(page: Page) -> None:
    assert page.open == []
    assert page.outside == []
    # The one script sorts tables, and requests nothing.
    assert page.tags.count("script") == 1
    for way_out in ("fetch(", "XMLHttpRequest", "http://", "https://", "import(", "WebSocket"):
        assert way_out not in page.text.partition("// Sorts a table")[2]
    assert "@import" not in page.text
    assert re.findall(r"url\((?!#)", page.text) == []
    assert len(page.ids) == len(set(page.ids))


def test_the_page_shows_everything_in_the_record(page: Page) -> None:
    record = example()
    text = " ".join(page.text.split())
    assert (
        text.index("Ship lora-r32@r8")
        < text.index("Results")
        < text.index("Every trial")
        < text.index("Reproduce")
    )
    for trial in record.trials:
        assert trial.id in text
        assert trial.run_id in text
        assert trial.reason in text
    for wanted in (
        record.data_digest,
        record.git_commit,
        "torch 2.13.0",
        "optim.schedule",
        "all-linear",
        "21m 50s",
    ):
        assert wanted in text
    for command in record.commands:
        assert command.command in text
    assert "+0.39 [+0.32, +0.46]" in text
    assert "31 + 64 = 95 + 1 = 96" in text


@pytest.mark.usefixtures("bare")
def test_what_was_left_out_of_the_data_is_listed(page: Page) -> None:
    assert "left out of the data" not in page.text.lower()
    sentences = ("a.jsonl: dropped 2 of 44 rows <b>", "b.jsonl: dropped 5 of 15 rows")
    shown = Page(html(changed(data_dropped=sentences)))
    assert shown.open == []
    assert shown.outside == []
    assert "data" in shown.ids
    assert shown.text.index("what was left out of the data") < shown.text.index("Results")
    places = [shown.text.index(part) for part in ("Left out of the data", *sentences, "Every trial")]
    assert places == sorted(places)


def test_the_table_has_baselines_trials_and_squeezed_adapters_in_this_order(page: Page) -> None:
    table = page.text[page.text.index("Results") :]
    order = [
        "without training",
        "majority answer",
        "trials",
        "lora_plus-r16",
        "squeezed from lora-r32",
        "@r2",
    ]
    places = [table.index(name) for name in order]
    assert places == sorted(places)


def test_names_are_escaped() -> None:
    evil = '<script>alert("$x$")</script>'
    trials = list(example().model_dump()["trials"])
    trials[1] |= {"id": evil, "reason": evil, "settings": {evil: evil}}
    page = Page(html(changed(name=evil, question=evil, trials=trials)))
    assert page.tags.count("script") == 1, "the page's own"
    assert evil in page.text


def test_the_same_record_makes_the_same_page_also_as_a_file(page: Page, tmp_path: Path) -> None:
    path = render(example(), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == page.html


@pytest.mark.parametrize(
    ("parts", "figures"),
    [
        ({"squeezed": [], "comparisons": [], "winner": None}, ["scores", "time", "memory", "learning"]),
        ({"squeezed": [], "trials": [], "winner": None}, []),
        (
            {"baselines": [], "served": None, "commands": [], "timings": {}},
            ["scores", "time", "memory", "learning", "energy", "squeeze"],
        ),
        (
            {"singular_values": {"a": [0.0, 0.0], "b": [float("nan")]}},
            ["scores", "time", "memory", "learning", "squeeze"],
        ),
    ],
    ids=["no winner", "no trials", "no extras", "no spectrum"],
)
def test_what_did_not_happen_is_left_out(parts: dict[str, Any], figures: list[str]) -> None:
    page = Page(html(changed(**parts)))
    assert re.findall(r'<figure class="([^"]*)">', page.html) == figures
    assert page.open == []
    assert ("Figures" in page.text) == bool(figures)


@pytest.mark.usefixtures("bare")
def test_evaluations_are_shown_and_their_texts_are_escaped(page: Page) -> None:
    evil = "<b>mine</b>"
    row = EvaluatedScore(
        target=evil, task="arc_easy", metric="acc", score=Score(value=0.5, low=0.4, high=0.6, n=9)
    )
    one = SavedEvaluation(date="2026-11-29T10:11:12", base=evil, how={evil: evil}, scores=(row,))
    shown = Page(html(example(), None, SavedEvaluations((one,), (evil,))))
    assert shown.open == []
    assert shown.outside == []
    assert "b" not in shown.tags
    assert "evaluations" in shown.ids
    assert "arc_easy, acc0.50 [0.40, 0.60]9" in shown.text
    assert f"another version: {evil}" in shown.text
    assert "Evaluations" not in page.text


@pytest.mark.usefixtures("bare")
def test_many_trials_are_folded_and_scroll(page: Page) -> None:
    base = example().model_dump()["trials"][0]
    trials = [{**base, "id": f"t{i}", "method": f"m{i % 11}", "bytes": 10**5 * (i + 1)} for i in range(30)]
    record = changed(
        trials=trials, squeezed=[], comparisons=[], winner={"trial": "t0", "ship": "t0", "why": "w"}
    )
    many = Page(html(record))
    assert many.open == []
    assert "<summary>All 30 trials</summary>" in many.html
    assert many.html.count('class="scroll long"') == 1
    assert "<summary>All" not in page.html
    assert 'class="scroll long"' not in page.html


@pytest.mark.usefixtures("bare")
def test_methods_stand_beside_each_other(page: Page) -> None:
    def row(method: str, **more: Any) -> MethodScore:
        test, seeds = Score(value=0.5, low=0.4, high=0.6, n=9), (f"{method}-s0", f"{method}-s1")
        return MethodScore(
            method=method, settings=f"{method}<r8>", tried=2, trials=seeds, val_loss=0.5, test=test, **more
        )

    less = Score(value=-0.02, low=-0.1, high=0.06, n=9)
    methods = [row("cla", against="lora", difference=less), row("lora")]
    record = SweepRecord.model_validate({**example().model_dump(), "methods": methods})
    text = Page(html(record)).text
    for wanted in (
        "difference to lora",
        "cla<r8>",
        "−0.02 [−0.10, +0.06]",
        "cla can't be told apart from lora",
        "another draw of seeds and",
    ):
        assert wanted in text
    assert "difference to lora" not in page.text

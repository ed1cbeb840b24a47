import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from rayft.report import MethodScore, Score, SweepRecord
from rayft.report.figures import Drawing, draw_all
from rayft.report.render import html, render
from tests.unit.report.example import example

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Reads a page; knows unbalanced tags, ids, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []
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
def drawings() -> list[Drawing]:
    return draw_all(example())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(html(example()))


def changed(**parts: Any) -> SweepRecord:
    return SweepRecord.model_validate({**example().model_dump(), **parts})


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert page.open == []
    assert page.outside == []
    # One script, which sorts tables and asks nobody for anything.
    assert page.tags.count("script") == 1
    for way_out in ("fetch(", "XMLHttpRequest", "http://", "https://", "import(", "WebSocket"):
        assert way_out not in page.text.partition("// Sorts a table")[2]
    assert "@import" not in page.text
    assert re.findall(r"url\((?!#)", page.text) == []
    assert len(page.ids) == len(set(page.ids))


def test_the_page_says_everything(page: Page) -> None:
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


def test_what_was_left_out_of_the_data_is_said(page: Page) -> None:
    assert "left out of the data" not in page.text.lower()
    sentences = ("a.jsonl: dropped 2 of 44 rows <b>", "b.jsonl: dropped 5 of 15 rows")
    told = Page(html(changed(data_dropped=sentences)))
    assert told.open == []
    assert told.outside == []
    assert "data" in told.ids
    assert told.text.index("what was left out of the data") < told.text.index("Results")
    places = [told.text.index(part) for part in ("Left out of the data", *sentences, "Every trial")]
    assert places == sorted(places)


def test_rows_of_the_table_are_in_order(page: Page) -> None:
    table = page.text[page.text.index("without training") :]
    order = ["majority answer", "trials", "lora_plus-r16", "squeezed from lora-r32", "@r2"]
    places = [table.index(name) for name in order]
    assert places == sorted(places)


def test_names_are_text_and_never_markup() -> None:
    evil = '<script>alert("$x$")</script>'
    trials = list(example().model_dump()["trials"])
    trials[1] |= {"id": evil, "reason": evil, "settings": {evil: evil}}
    page = Page(html(changed(name=evil, question=evil, trials=trials)))
    assert page.tags.count("script") == 1, "the page's own"
    assert evil in page.text


def test_every_figure_is_drawn_with_words(drawings: list[Drawing]) -> None:
    assert [drawing.key for drawing in drawings] == [
        "scores", "time", "memory", "learning", "energy", "squeeze",
    ]  # fmt: skip
    scores, time, memory, learning, energy, squeeze = drawings
    # What a squeeze took is no training, and its memory was not measured.
    assert "@r8" not in time.alt + memory.alt
    assert "lora-r32@r8 0.60 at 2.48 MB" in scores.alt
    assert "Pareto front: lora-r32@r2, lora-r32@r4, lora-r32@r8, lora-r32@r16" in scores.alt
    assert "c3la-r8 1.72 at step 15 (stopped)" in learning.alt
    assert re.search(r"\d+\.\d % at rank 8", energy.alt)
    assert squeeze.alt.startswith("Test score by rank: rank 2 (post) 0.36;")


def test_figures_are_legible_on_a_phone(drawings: list[Drawing]) -> None:
    for drawing in drawings:
        root = ET.fromstring(drawing.svg)  # noqa: S314  (drawn here)
        _, _, width, _ = map(float, root.attrib["viewBox"].split())
        assert width <= 328  # a phone of 360 pixels less the margins
        assert "width" not in root.attrib
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", drawing.svg)]
        assert len(sizes) > 8
        assert min(sizes) >= 11
        assert "DejaVu" not in drawing.svg
        assert "<style" not in drawing.svg


def test_figures_take_the_colours_of_the_page(drawings: list[Drawing]) -> None:
    variables = set(re.findall(r"--[\w-]+(?=:)", html(example())))
    for drawing in drawings:
        assert re.findall(r"#[0-9a-f]{6}\b", drawing.svg) == []
        used = set(re.findall(r"var\((--[\w-]+)\)", drawing.svg))
        assert {"--ink", "--soft", "--grid"} <= used <= variables


def test_points_are_named_in_the_figure(drawings: list[Drawing]) -> None:
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawings[0].svg)
    front = {"@r2", "@r4", "@r8", "@r16", "lora-r32"}
    assert front <= set(texts)
    assert {"few shot 0.21", "majority answer 0.04"} <= set(texts)


def test_the_same_record_makes_the_same_page() -> None:
    assert html(example()) == html(example())


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
def test_what_has_not_happened_is_left_out(parts: dict[str, Any], figures: list[str]) -> None:
    record = changed(**parts)
    assert [drawing.key for drawing in draw_all(record)] == figures
    page = Page(html(record))
    assert page.open == []
    assert ("Figures" in page.text) == bool(figures)


def test_one_trial_with_one_point() -> None:
    (only, *_) = example().trials
    trial = {**only.model_dump(), "val_loss": [(0, 2.0)], "train_loss": []}
    record = changed(
        trials=[trial], squeezed=[], comparisons=[], winner={"trial": only.id, "ship": only.id, "why": "w"}
    )
    assert [drawing.key for drawing in draw_all(record)] == ["scores", "learning", "energy"]


def test_thirty_trials_fit() -> None:
    base = example().model_dump()["trials"][0]
    trials = [{**base, "id": f"t{i}", "method": f"m{i % 11}", "bytes": 10**5 * (i + 1)} for i in range(30)]
    record = changed(
        trials=trials, squeezed=[], comparisons=[], winner={"trial": "t0", "ship": "t0", "why": "w"}
    )
    looks = re.findall(r"<text[^>]*>(m\d+)</text>", draw_all(record)[1].svg)
    assert sorted(looks) == sorted(f"m{i}" for i in range(11))
    page = html(record)
    assert "<summary>All 30 trials</summary>" in page
    assert page.count("<details") == page.count("</details>")
    assert "<summary>All" not in html(example())


def test_render_writes_the_file(tmp_path: Path) -> None:
    path = render(example(), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == html(example())


def test_points_and_curves_tell_their_names_under_the_pointer() -> None:
    evil = "<b>&"
    trials = list(example().model_dump()["trials"])
    trials[1] |= {"id": evil}
    drawn = {drawing.key: drawing.svg for drawing in draw_all(changed(trials=trials))}
    titles = {
        key: [one.text for one in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}title")]  # noqa: S314
        for key, text in drawn.items()
    }
    assert "lora-r32@r8: 0.60 [0.54, 0.66] at 2.48 MB" in titles["scores"]
    assert any(title and title.startswith(f"{evil}: ") for title in titles["scores"])
    assert any(title and title.startswith("c3la-r8 1.72 at step 15") for title in titles["learning"])
    assert "tip-" not in "".join(drawn.values())


def test_methods_stand_beside_each_other() -> None:
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
        "can be told apart",
        "other seeds and",
    ):
        assert wanted in text
    assert "difference to lora" not in Page(html(example())).text


def test_long_tables_scroll() -> None:
    assert 'class="scroll long"' not in html(example())
    trials = [
        example().trials[0].model_copy(update={"id": f"t{number}", "status": "finished"})
        for number in range(30)
    ]
    known = {"trials": [*example().trials, *trials]}
    page = html(SweepRecord.model_validate({**example().model_dump(), **known}))
    assert page.count('class="scroll long"') == 1

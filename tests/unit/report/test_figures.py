"""The figures of a sweep: their words, colours, names and size."""

import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from rayft.report import SweepRecord
from rayft.report.figures import sweep_figures
from rayft.report.style import LIGHT, Drawing
from tests.unit.report.example import example


def changed(**parts: Any) -> SweepRecord:
    return SweepRecord.model_validate({**example().model_dump(), **parts})


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return sweep_figures(example())


def test_every_figure_is_described_in_words(drawings: list[Drawing]) -> None:
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
    for drawing in drawings:
        assert re.findall(r"#[0-9a-f]{6}\b", drawing.svg) == []
        used = set(re.findall(r"var\((--[\w-]+)\)", drawing.svg))
        assert {"--ink", "--soft", "--grid"} <= used <= {"--font", *(f"--{name}" for name in LIGHT)}


def test_points_are_named_in_the_figure(drawings: list[Drawing]) -> None:
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawings[0].svg)
    tags = {trial.id for trial in example().trials if trial.test} | {"@r2", "@r4", "@r8", "@r16"}
    assert tags <= set(texts), "every point, as they are not many"
    assert {"few shot 0.21", "majority answer 0.04"} <= set(texts)


def test_the_legend_has_a_look_for_each_method() -> None:
    base = example().model_dump()["trials"][0]
    trials = [{**base, "id": f"t{i}", "method": f"m{i % 11}", "bytes": 10**5 * (i + 1)} for i in range(30)]
    record = changed(
        trials=trials, squeezed=[], comparisons=[], winner={"trial": "t0", "ship": "t0", "why": "w"}
    )
    names = re.findall(r"<text[^>]*>(m\d+)</text>", sweep_figures(record)[1].svg)
    assert sorted(names) == sorted(f"m{i}" for i in range(11))


def test_one_trial_with_one_evaluation_has_figures() -> None:
    (only, *_) = example().trials
    trial = {**only.model_dump(), "val_loss": [(0, 2.0)], "train_loss": []}
    record = changed(
        trials=[trial], squeezed=[], comparisons=[], winner={"trial": only.id, "ship": only.id, "why": "w"}
    )
    assert [drawing.key for drawing in sweep_figures(record)] == ["scores", "learning", "energy"]


def test_a_curve_marks_the_step_whose_weights_were_kept() -> None:
    """Also in words and in the legend; not if the last weights were kept."""
    trials = list(example().model_dump()["trials"])
    kept = trials[1]
    assert kept["kept_step"] == 25 < kept["steps"]

    def learning(*steps: int | None) -> tuple[str, int, bool]:
        changes = dict(enumerate(steps, 1))
        these = [{**trial, "kept_step": changes.get(number)} for number, trial in enumerate(trials)]
        drawn = next(one for one in sweep_figures(changed(trials=these)) if one.key == "learning")
        return drawn.alt, drawn.svg.count("<use "), ">kept</text>" in drawn.svg

    (plain, marks, named), (one, more, in_legend) = learning(None), learning(25)
    assert (named, in_legend) == (False, True)
    # One in the legend and one on the curve; of a second trial, one on its curve.
    assert (more - marks, learning(25, 20)[1] - more) == (2, 1)
    loss = dict(kept["val_loss"])[25]
    assert f"lora-r8 {kept['val_loss'][-1][1]:.2f} at step 40, kept {loss:.2f} of step 25;" in one
    assert ", kept " not in plain


def test_points_and_curves_show_their_names_under_the_pointer() -> None:
    evil = "<b>&"
    trials = list(example().model_dump()["trials"])
    trials[1] |= {"id": evil}
    drawn = {drawing.key: drawing.svg for drawing in sweep_figures(changed(trials=trials))}
    titles = {
        key: [one.text for one in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}title")]  # noqa: S314
        for key, text in drawn.items()
    }
    assert "lora-r32@r8: 0.60 [0.54, 0.66] at 2.48 MB" in titles["scores"]
    assert any(title and title.startswith(f"{evil}: ") for title in titles["scores"])
    assert any(title and title.startswith("c3la-r8 1.72 at step 15") for title in titles["learning"])
    assert "tip-" not in "".join(drawn.values())


def ticks(svg: str, axis: int) -> list[str]:
    """Return the labels of an axis."""
    part = svg.partition(f'id="learning-matplotlib.axis_{axis}"')[2].partition('id="learning-matplotlib')[0]
    return re.findall(r'id="learning-text_.*?<text[^>]*>([\d.+−]+)</text>', part, re.DOTALL)


def test_one_loss_has_ticks_that_can_be_read() -> None:
    trial = example().trials[0].model_copy(update={"val_loss": ((4, 1.0209512),), "kept_step": None})
    record = example().model_copy(
        update={"trials": (trial,), "winner": None, "squeezed": (), "comparisons": ()}
    )
    (learning,) = (one for one in sweep_figures(record) if one.key == "learning")
    steps, losses = ticks(learning.svg, 1), ticks(learning.svg, 2)
    assert steps == ["4"]
    # An offset such as +1.02 would be added to each of them.
    assert all(1.0 <= float(loss) < 1.05 and len(loss) <= 6 for loss in losses)
    assert len(losses) > 2


def test_names_do_not_lie_on_the_lines_of_baselines() -> None:
    base = example().baselines[0]
    level = base.model_copy(update={"test": base.test.model_copy(update={"value": 0.5})})
    test = base.test.model_copy(update={"value": 0.5, "low": 0.45, "high": 0.55})
    trials = tuple(
        one.model_copy(update={"test": test, "bytes": 10 ** (3 + n), "status": "finished"})
        for n, one in enumerate(example().trials[:2])
    )
    record = example().model_copy(
        update={"trials": trials, "winner": None, "squeezed": (), "comparisons": (), "baselines": (level,)}
    )
    (scores,) = (one for one in sweep_figures(record) if one.key == "scores")
    line = re.search(r'd="M [\d.]+ ([\d.]+) \nL [\d.]+ \1 \n"[^>]*stroke-dasharray: 1', scores.svg)
    assert line
    for trial in trials:
        place = re.search(rf'y="([\d.]+)"[^>]*>{re.escape(trial.id)}<', scores.svg)
        assert place
        # The y of a text is its baseline; its letters reach 8 units above.
        assert not float(place[1]) - 8 < float(line[1]) < float(place[1]) + 1

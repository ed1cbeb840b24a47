"""The README's figure: score against size after `make demo`, drawn by the report from the demo's results.

The report's figures take their colours and fonts from the page around them. A picture in a README has no
page, so the colours of the report's light theme are written into it, on a white background.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rayft.report.figures import sweep_figures
from rayft.report.record import Baseline, Score, Squeezed, SweepRecord, TrialRecord, Winner
from rayft.report.style import LIGHT, Drawing

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "demo.svg"
Cases = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Case → metric → result, as `benchmarks.records.cases` returns them."""


def demo_record(found: Cases) -> SweepRecord:
    """Build the part of the demo's record that the figure needs.

    Args:
        found: the results of the bench `demo`.

    Returns:
        A record with baselines, trials and squeezed adapters. The results do not say which adapter the demo
        shipped, so the winner itself stands in for it and is drawn as the large point.
    """
    baselines, trials, squeezed = [], [], []
    for case, metrics in found.items():
        if "score" not in metrics:
            continue
        score = metrics["score"]
        test = Score(value=score["value"], low=score["ci_low"], high=score["ci_high"], n=score["n"])
        if "parameters" not in metrics:
            baselines.append(Baseline(name=case, test=test))
            continue
        source, at, rank = case.partition("@r")
        size = round(1e6 * metrics["mb"]["value"])
        if at:
            squeezed.append(
                Squeezed(
                    name=case, trial=source, rank=int(rank), energy_mean=1, energy_min=1, test=test,
                    bytes=size,
                )
            )  # fmt: skip
        else:
            method, rank = re.findall(r"^(\w+)-r(\d+)-", case)[0]
            trials.append(
                TrialRecord(
                    id=case, method=method, rank=int(rank), alpha=None, lr=metrics["parameters"]["lr"],
                    seed=0, status="finished", test=test, bytes=size,
                )
            )  # fmt: skip
    (winner,) = {item.trial for item in squeezed}
    return SweepRecord(
        name="demo", question="", date="", model="", task="", data_digest="", seed=0, device="",
        baselines=tuple(baselines), trials=tuple(trials), squeezed=tuple(squeezed),
        winner=Winner(trial=winner, ship=winner, why=""),
    )  # fmt: skip


def draw(found: Cases) -> Drawing:
    """Draw score against size as the report does."""
    return next(drawing for drawing in sweep_figures(demo_record(found)) if drawing.key == "scores")


def standalone(svg: str) -> str:
    """Replace the report's CSS variables in an SVG, so that it can be shown without the report's page."""
    for name, colour in LIGHT.items():
        svg = svg.replace(f"var(--{name})", colour)
    svg = svg.replace("var(--font)", "Helvetica, Arial, sans-serif")
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return re.sub(r"<svg[^>]*>", rf"\g<0>{paper}", svg, count=1) + "\n"


def demo_image(found: Cases) -> str:
    """Return the README's image element, whose alternative text holds the figure's numbers."""
    alt = escape(draw(found).alt, quote=True)
    return f'<img src="docs/images/{PICTURE.name}" width="420" alt="{alt}">'


def write(found: Cases) -> None:
    """Write the picture."""
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(standalone(draw(found).svg), encoding="utf-8")

"""An analysis in the tracker: numbers, plots and raw data in the runs of the trials that they are of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rayft.analysis.landscape import Landscape
from rayft.analysis.record import AdapterAnalysis, SweepAnalysis
from rayft.report.landscape import contour_plot, curve_plot, surface_plot
from rayft.tracking.base import Tracker

__all__ = ["track_analysis"]


def track_analysis(tracker: Tracker, analysis: SweepAnalysis, runs: Mapping[str, str], folder: Path) -> None:
    """Record what was found of each adapter that has a run.

    Args:
        tracker: where to.
        analysis: what was found.
        runs: adapter → its run; empty where it has none.
        folder: for the files, which stay until they are sent.
    """
    for one in analysis.adapters:
        run = runs.get(one.name, "")
        if not run:
            continue
        known = {f"analysis/{name}": value for name, value in one.measures.items() if math.isfinite(value)}
        tracker.metrics(run, known)
        for path in _files(one, folder / one.name.replace("/", "-").replace(" ", "-")):
            tracker.artifact(run, path, "analysis")


def _files(one: AdapterAnalysis, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "analysis.json"
    data.write_text(one.model_dump_json(indent=1) + "\n")
    found = [data]
    for kind, raw in one.landscapes.items():
        landscape = Landscape.from_json(raw)
        if len(landscape.coordinates[0]) == 1:
            found.append(curve_plot({one.name: landscape}, one.name, folder / f"line-{kind}.png"))
        else:
            found.append(contour_plot(landscape, one.name, folder / f"landscape-{kind}.png"))
            found.append(surface_plot(landscape, one.name, folder / f"surface-{kind}.png"))
    return found

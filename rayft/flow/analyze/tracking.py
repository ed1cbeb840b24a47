"""Track an analysis: numbers, plots and raw data go to the runs of the trials that were analysed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ray

from rayft.analysis.record import AdapterAnalysis, Landscape, SweepAnalysis
from rayft.files import write_file
from rayft.report.landscape import contour_plot, curve_plot, surface_plot
from rayft.tracking.base import Tracker

__all__ = ["track_analysis"]


def track_analysis(tracker: Tracker, analysis: SweepAnalysis, runs: Mapping[str, str], folder: Path) -> None:
    """Track the findings of each adapter that has a run. Plots are drawn on all cores of a cluster.

    Args:
        tracker: where to track them.
        analysis: the findings.
        runs: adapter → id of its run; empty if it has none.
        folder: for the files, which stay there until they are sent.
    """
    tracked = [one for one in analysis.adapters if runs.get(one.name, "")]
    for one, files in zip(tracked, _drawn(tracked), strict=True):
        run = runs[one.name]
        known = {f"analysis/{name}": value for name, value in one.measures.items() if math.isfinite(value)}
        tracker.metrics(run, known)
        place = folder / one.name.replace("/", "-").replace(" ", "-")
        for name, content in {
            "analysis.json": one.model_dump_json(indent=1).encode() + b"\n",
            **files,
        }.items():
            write_file(place / name, content)
            tracker.artifact(run, place / name, "analysis")


def _drawn(adapters: Sequence[AdapterAnalysis]) -> Iterator[Mapping[str, bytes]]:
    """Yield the plots of each adapter: file name → content."""
    if not ray.is_initialized() or len(adapters) < 2:
        return map(_draw, adapters)
    draw = ray.remote(num_cpus=1)(_draw)
    return map(ray.get, [draw.remote(one) for one in adapters])


def _draw(one: AdapterAnalysis) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for kind, raw in one.landscapes.items():
            landscape = Landscape.from_json(raw)
            if not landscape.finite:
                continue  # Its raw data is tracked all the same.
            if len(landscape.coordinates[0]) == 1:
                curve_plot(landscape, one.name, folder / f"line-{kind}.png")
            else:
                contour_plot(landscape, one.name, folder / f"landscape-{kind}.png")
                surface_plot(landscape, one.name, folder / f"surface-{kind}.png")
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

"""The findings of an analysis are tracked in the runs of the adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rayft.analysis.landscape import grid_1d, grid_2d
from rayft.analysis.record import AdapterAnalysis, Landscape, SweepAnalysis
from rayft.analysis.section import AnalyzeConfig
from rayft.flow.analyze import tracking as module
from rayft.flow.analyze.tracking import track_analysis


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.numbers: dict[str, dict[str, float]] = {}
        self.files: dict[str, dict[str, bytes]] = {}

    def metrics(self, run: str, values: dict[str, float], step: int | None = None) -> None:
        self.numbers[run] = values

    def artifact(self, run: str, path: Path, folder: str = "") -> None:
        self.files.setdefault(run, {})[f"{folder}/{path.name}"] = path.read_bytes()


def plane(*, finite: bool = True) -> dict:
    points = tuple(tuple(point) for point in grid_2d(3, 1.0).tolist())
    losses = tuple(x * x + y * y if finite else math.nan for x, y in points)
    return Landscape("random", "update", points, losses, 0, 5).to_json()


def line() -> dict:
    points = tuple(tuple(point) for point in grid_1d(3, 1.0).tolist())
    return Landscape("random", "update", points, (2.0, 1.0, 2.0), 0, 5).to_json()


def test_numbers_data_and_plots_go_to_the_adapters_run(tmp_path: Path) -> None:
    one = AdapterAnalysis(
        name="a/r8 s0",
        measures={"gap": 0.5, "trace": math.nan},
        landscapes={"random": plane(), "line": line()},
    )
    other = AdapterAnalysis(name="b", measures={"gap": 0.1})
    tracker = Kept()
    found = SweepAnalysis(config=AnalyzeConfig(), adapters=(one, other))
    track_analysis(tracker, found, {"a/r8 s0": "run", "b": ""}, tmp_path)  # type: ignore[arg-type]
    assert tracker.numbers == {"run": {"analysis/gap": 0.5}}
    files = tracker.files["run"]
    assert {name for name in files if name.endswith(".png")} == {
        "analysis/line-line.png", "analysis/landscape-random.png", "analysis/surface-random.png",
    }  # fmt: skip
    assert all(content.startswith(b"\x89PNG") for name, content in files.items() if name.endswith(".png"))
    assert json.loads(files["analysis/analysis.json"])["name"] == "a/r8 s0"
    assert (tmp_path / "a-r8-s0" / "analysis.json").is_file(), "the file stays until it is sent"


@pytest.mark.parametrize("count", [1, 3])
def test_a_landscape_that_can_not_be_drawn_is_tracked_all_the_same(count: int, tmp_path: Path) -> None:
    adapters = tuple(
        AdapterAnalysis(name=f"n{n}", landscapes={"random": plane(finite=False), "line": line()})
        for n in range(count)
    )
    tracker = Kept()
    found = SweepAnalysis(config=AnalyzeConfig(), adapters=adapters)
    track_analysis(tracker, found, {one.name: one.name for one in adapters}, tmp_path)  # type: ignore[arg-type]
    for files in tracker.files.values():
        assert set(files) == {"analysis/analysis.json", "analysis/line-line.png"}


def test_all_cores_of_a_cluster_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Remote:
        def __init__(self, function) -> None:
            self.function = function

        def remote(self, one: AdapterAnalysis) -> dict[str, bytes]:
            given.append(one.name)
            return self.function(one)

    monkeypatch.setattr(module.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(module.ray, "remote", lambda **wants: Remote if wants == {"num_cpus": 1} else None)
    monkeypatch.setattr(module.ray, "get", lambda found: found)
    adapters = tuple(AdapterAnalysis(name=name, landscapes={"line": line()}) for name in ("a", "b"))
    tracker = Kept()
    found = SweepAnalysis(config=AnalyzeConfig(), adapters=adapters)
    track_analysis(tracker, found, {"a": "1", "b": "2"}, tmp_path)  # type: ignore[arg-type]
    assert given == ["a", "b"]
    assert {run: set(files) for run, files in tracker.files.items()} == {
        run: {"analysis/analysis.json", "analysis/line-line.png"} for run in ("1", "2")
    }

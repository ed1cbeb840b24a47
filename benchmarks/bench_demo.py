"""Run `rayft demo`, measure its memory, and save its scores, sizes, times and overheads as results.

python benchmarks/bench_demo.py            # runs the demo
python benchmarks/bench_demo.py --read DIR # reads the folder of a finished sweep (no memory, no total)
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.records import record, save
from rayft.report.record import SweepRecord


def run_demo() -> tuple[float, float]:
    """Run the demo; return its seconds, and the peak proportional set size of its processes in GiB."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", "rayft.cli", "demo"])
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(2)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.monotonic() - started, peak / 2**30


def _memory(pid: int) -> int:
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def results(sweep: SweepRecord, bench: str) -> list[dict[str, Any]]:
    """Return the results of the record of a sweep."""
    known = {"device": sweep.device, "versions": sweep.versions}
    found = []

    def add(case: str, metric: str, value: float, unit: str, **more: Any) -> None:
        found.append(record(bench, case, metric, value, unit, **known, **more))

    entries: list[Any] = [*sweep.baselines, *sweep.trials, *sweep.squeezed]
    for entry in entries:
        name = getattr(entry, "id", None) or getattr(entry, "name")  # noqa: B009
        if entry.test:
            score = entry.test
            add(name, "score", score.value, "1", ci_low=score.low, ci_high=score.high, n=score.n)
    for trial in sweep.trials:
        add(trial.id, "parameters", trial.trainable, "1", lr=trial.lr, seeds=[trial.seed])
        add(trial.id, "mb", trial.bytes / 1e6, "MB")
        add(trial.id, "seconds", trial.seconds, "s")
    for item in sweep.squeezed:
        add(item.name, "parameters", item.parameters, "1")
        add(item.name, "mb", item.bytes / 1e6, "MB")
    return found


def overheads(sweep: SweepRecord, place: str) -> list[dict[str, Any]]:
    """Return the seconds of a lane's trials without steps and evaluations: of the first, and of others."""
    known = {"device": sweep.device, "versions": sweep.versions}
    spent = [trial.overhead_seconds for trial in sweep.trials if trial.status != "failed"]
    first, later = max(spent), sorted(spent)[:-1]
    found = [record("sweep_overhead", f"lane_first/{place}", "seconds_per_trial", first, "s", n=1, **known)]
    if later:
        value = statistics.median(later)
        spread = {"p20": later[0], "p80": later[-1], "n": len(later)}
        found.append(
            record("sweep_overhead", f"lane/{place}", "seconds_per_trial", value, "s", **spread, **known)
        )
    return found


def main() -> None:
    """Run the demo or read a sweep, and save the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read", type=Path)
    parser.add_argument("--bench", default="demo")
    parser.add_argument("--place", default="cpu")
    arguments = parser.parse_args()
    whole = None if arguments.read else run_demo()
    sweep = SweepRecord.load(arguments.read or Path("runs/demo"))
    found = results(sweep, arguments.bench)
    if whole:
        known = {"device": sweep.device, "versions": sweep.versions}
        found.append(record(arguments.bench, "whole", "seconds", whole[0], "s", **known))
        found.append(record(arguments.bench, "whole", "peak_gib", whole[1], "GiB", **known))
    save(arguments.bench, found)
    save("sweep_overhead", overheads(sweep, arguments.place))


if __name__ == "__main__":
    main()

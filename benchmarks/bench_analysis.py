"""Measure the time of each part of an analysis, for one adapter on a device that nothing else uses.

    python benchmarks/bench_analysis.py SWEEP TRIAL [--grid 25] [--commit HASH]

SWEEP is the folder of a finished sweep, TRIAL the name of one of its trials. On a GPU, the Hessian is
measured with and without a CUDA graph. Each part runs once, so `gap` includes the first forwards of the
process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.records import record, save
from rayft.analysis.hessian import HessianOperator
from rayft.analysis.job import TRAIL, analyze
from rayft.analysis.section import PARTS, AnalyzeConfig
from rayft.artifacts import AdapterArtifact
from rayft.flow.analyze.source import find_items
from rayft.train.session import Session
from rayft.train.worker import Worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("trial")
    parser.add_argument("--grid", type=int, default=25)
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    sources = find_items(str(arguments.sweep), None, None, Path())
    item = {item.name: item for item in sources.items}.get(arguments.trial)
    if item is None:
        parser.error(f"no trial {arguments.trial}: {', '.join(item.name for item in sources.items)}")
    gpu = torch.cuda.is_available()
    session = Session.open(item.run, Worker(device="cuda:0" if gpu else "cpu"))
    artifact, trail = AdapterArtifact.load(item.folder), item.folder.parent / TRAIL
    config = sources.settings.analyze.model_copy(update={"grid": arguments.grid, "parts": PARTS})

    def seconds(config: AnalyzeConfig) -> dict[str, float]:
        found = analyze(session, item.run, artifact, config, name=item.name, trail=trail)
        print(
            found.notes,
            {name: found.measures.get(name) for name in ("hessian_eigenvalue_1", "hessian_trace")},
        )
        return {part: found.seconds[part] for part in config.parts if part not in found.notes}

    found = seconds(config)
    if gpu:
        with patch("rayft.analysis.sharpness.hessian_operator", HessianOperator):
            found["hessian/eager"] = seconds(config.model_copy(update={"parts": ("hessian",)}))["hessian"]
    model = Path(item.run.model.name).name
    place = f"{model}/{item.run.method.name}-r{item.run.method.rank}/{arguments.grid}x{arguments.grid}"
    rows = [
        record("analysis", f"{part}/{place}", "seconds", value, "s", n=1) for part, value in found.items()
    ]
    for row in rows:
        print(f"{row['case']:50} {row['value']:8.2f} s")
    save("analysis", [{**row, "commit": arguments.commit or row["commit"]} for row in rows])


if __name__ == "__main__":
    main()

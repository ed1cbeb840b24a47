"""Measure what adapters are like beside their score: `rayft analyze` as a script."""

from __future__ import annotations

import argparse

from rayft.flow import commands
from rayft.flow.address import default_folder
from rayft.flow.console import terminal


def main() -> None:
    """Parse and call; with no argument it analyses the demo's sweep."""
    demo = default_folder("demo")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", default=str(demo), help="a sweep, an adapter or a run's id")
    parser.add_argument("--parts", action="append", default=[], help="gap, bounds, spectra, …; by commas")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--config", help="a sweep's configuration: base and data")
    parser.add_argument("--out", help="folder for analysis.json")
    parser.add_argument("--uri", help="tracking server of a run")
    parser.add_argument("--overwrite", action="store_true", help="replace an analysis of other adapters")
    options = vars(parser.parse_args())
    target = options.pop("target")
    commands.guarded(lambda: commands.analyze(target, terminal(), **options))


if __name__ == "__main__":
    main()

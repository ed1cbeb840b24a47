"""Measure properties of adapters other than their score: `rayft analyze` as a script."""

from __future__ import annotations

import argparse

from rayft.flow import commands
from rayft.flow.address import default_folder
from rayft.flow.console import terminal


def main() -> None:
    """Parse the options and run the command; without arguments, analyse the demo's sweep."""
    demo = default_folder("demo")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "target",
        nargs="?",
        default=str(demo),
        help="a sweep's folder, an adapter's folder or the id of a tracked run",
    )
    parser.add_argument(
        "--parts", action="append", default=[], help="gap, bounds, spectra, …; separated by commas"
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument(
        "--config", help="a sweep's configuration, for the base and the data of a lone adapter"
    )
    parser.add_argument("--out", help="folder for analysis.json; by default the target")
    parser.add_argument("--uri", help="tracking server that has the run")
    parser.add_argument("--overwrite", action="store_true", help="replace an analysis of other adapters")
    options = vars(parser.parse_args())
    target = options.pop("target")
    commands.guarded(lambda: commands.analyze(target, terminal(), **options))


if __name__ == "__main__":
    main()

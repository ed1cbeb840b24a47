"""Search, squeeze, score, register and report: `rayft sweep` as a script for `ray submit` and Ray jobs."""

from __future__ import annotations

import argparse

from rayft.flow import commands
from rayft.flow.console import terminal


def main() -> None:
    """Parse the options and run the command; without arguments, run the packaged demo configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config", default="demo", help="a YAML file, or a packaged configuration: demo, study, tiny"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="set a leaf of the configuration"
    )
    arguments = parser.parse_args()
    commands.guarded(lambda: commands.sweep(arguments.config, arguments.set, terminal()))


if __name__ == "__main__":
    main()

"""Serve a sweep's result: `rayft serve` as a script."""

from __future__ import annotations

import argparse

from rayft.flow import commands
from rayft.flow.address import default_folder
from rayft.flow.console import terminal


def main() -> None:
    """Parse the options and run the command; without arguments, serve the demo's result."""
    parser = argparse.ArgumentParser(description=__doc__)
    serving = str(default_folder("demo") / "serve.yaml")
    parser.add_argument("--config", default=serving, help="a serving configuration")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="set a leaf of the configuration"
    )
    arguments = parser.parse_args()
    commands.guarded(lambda: commands.serve(arguments.config, arguments.set, terminal()))


if __name__ == "__main__":
    main()

"""Write a sweep's report again: `rayft report` as a script."""

from __future__ import annotations

import argparse

from rayft.flow import commands
from rayft.flow.address import default_folder
from rayft.flow.console import terminal


def main() -> None:
    """Parse the options and run the command; without arguments, report the demo's sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", nargs="?", default=str(default_folder("demo")), help="a sweep's folder")
    parser.add_argument("-o", "--output", help="the HTML file; by default in the sweep's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the report of another sweep")
    arguments = parser.parse_args()
    commands.guarded(
        lambda: commands.report(arguments.sweep, arguments.output, terminal(), overwrite=arguments.overwrite)
    )


if __name__ == "__main__":
    main()

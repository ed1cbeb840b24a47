"""Train one run, track and score it: `rayft train` as a script for `ray submit` and Ray jobs."""

from __future__ import annotations

import argparse

from rayft.flow import commands
from rayft.flow.console import terminal


def main() -> None:
    """Parse the options and run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config", required=True, help="a YAML file, or a packaged configuration: demo, study, tiny"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="set a leaf of the configuration"
    )
    parser.add_argument("--start", help="folder of a LoRA to go on from")
    arguments = parser.parse_args()
    commands.guarded(
        lambda: commands.train(arguments.config, arguments.set, terminal(), start=arguments.start)
    )


if __name__ == "__main__":
    main()

"""Bring an adapter folder to lower ranks: `rayft squeeze` as a script."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from rayft.flow import commands


def main() -> None:
    """Parse and call; with no argument it squeezes the demo's winner to rank 8."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", nargs="?", type=Path, default=Path("runs/demo/winner"))
    parser.add_argument("--rank", type=int, action="append", default=[])
    parser.add_argument("--energy", type=float, action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/demo/squeezed-by-hand"))
    arguments = parser.parse_args()
    ranks = arguments.rank or ([] if arguments.energy else [8])
    commands.guarded(
        lambda: commands.squeeze(arguments.adapter, arguments.out, ranks, arguments.energy, Console())
    )


if __name__ == "__main__":
    main()

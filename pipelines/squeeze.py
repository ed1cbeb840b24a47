"""Bring an adapter folder to lower ranks: `rayft squeeze` as a script."""

from __future__ import annotations

import argparse

from rayft.flow import commands
from rayft.flow.address import default_folder
from rayft.flow.console import terminal


def main() -> None:
    """Parse and call; with no argument it squeezes the demo's winner to rank 8."""
    demo = default_folder("demo")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", nargs="?", default=str(demo / "winner"))
    parser.add_argument("--rank", type=int, action="append", default=[])
    parser.add_argument("--energy", type=float, action="append", default=[])
    parser.add_argument("--budget", action="append", default=[], help="a size such as 1.5MB")
    parser.add_argument("--keep-score", type=float, help="share of the validation score to keep")
    parser.add_argument("--steps", type=int, help="train on for so many steps at the lower rank")
    parser.add_argument("--lr", type=float, help="learning rate of --steps")
    parser.add_argument("--config", help="a sweep's configuration: base and data")
    parser.add_argument("--base", help="the base, to check that the adapter fits it")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--overwrite", action="store_true", help="replace what another command made")
    parser.add_argument("--out", default=str(demo / "squeezed-by-hand"))
    options = vars(parser.parse_args())
    adapter, out = options.pop("adapter"), options.pop("out")
    many = {"ranks": options.pop("rank"), "energies": options.pop("energy")}
    many["budgets"] = options.pop("budget")
    if not any(many.values()) and options["keep_score"] is None:
        many["ranks"] = [8]
    commands.guarded(lambda: commands.squeeze(adapter, out, terminal(), **many, **options))


if __name__ == "__main__":
    main()

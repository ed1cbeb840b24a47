"""Squeeze an adapter to lower ranks: `rayft squeeze` as a script."""

from __future__ import annotations

import argparse

from rayft.flow import commands
from rayft.flow.address import default_folder
from rayft.flow.console import terminal


def main() -> None:
    """Parse the options and run the command; without arguments, squeeze the demo's winner to rank 8."""
    demo = default_folder("demo")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "adapter", nargs="?", default=str(demo / "winner"), help="an adapter's folder or models:/…"
    )
    parser.add_argument("--rank", type=int, action="append", default=[], help="a rank; may be repeated")
    parser.add_argument("--energy", type=float, action="append", default=[])
    parser.add_argument("--budget", action="append", default=[], help="a size such as 1.5MB")
    parser.add_argument(
        "--keep-score", type=float, help="smallest rank that keeps this share of the validation score"
    )
    parser.add_argument("--steps", type=int, help="continue training for this many steps at the lower rank")
    parser.add_argument("--lr", type=float, help="learning rate of --steps; by default the trial's")
    parser.add_argument("--config", help="a sweep's configuration, for the base and the data")
    parser.add_argument(
        "--base", help="the base: checked against the adapter, or the model that a tuned one began as"
    )
    parser.add_argument("--uri", help="MLflow, to find models:/…; MLFLOW_TRACKING_URI by default")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what another command of rayft wrote to --out"
    )
    parser.add_argument("--out", default=str(demo / "squeezed-by-hand"), help="folder for the results")
    options = vars(parser.parse_args())
    adapter, out = options.pop("adapter"), options.pop("out")
    many = {"ranks": options.pop("rank"), "energies": options.pop("energy")}
    many["budgets"] = options.pop("budget")
    if not any(many.values()) and options["keep_score"] is None:
        many["ranks"] = [8]
    commands.guarded(lambda: commands.squeeze(adapter, out, terminal(), **many, **options))


if __name__ == "__main__":
    main()

"""What `rayft demo` says in its first second. Imports nothing that takes long to import."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from rayft.report.text import human_seconds

__all__ = ["MEASURED_SECONDS", "introduce"]

MEASURED_SECONDS = 355.4
"""What the demo took with its packaged settings (`benchmarks/results/demo.json`, case `whole`)."""
MEASURED_ON = "a CPU with 2 threads"
"""Where that was measured."""
PLACES = ("output=", "serve.port=", "serve.host=")
"""How overrides begin that change where the demo writes and listens, and not what it does."""


def introduce(overrides: Sequence[str], console: Console) -> None:
    """Print what the demo will do, and how long that took where it was measured.

    Args:
        overrides: settings of the configuration, such as `sweep.trials=4`.
        console: for the output.
    """
    console.print(
        "The demo teaches SmolLM2-135M to find a fact in a few sentences: it trains four adapters, squeezes "
        "the best one, writes a report, serves the results over HTTP on this machine, and asks the server "
        "questions."
    )
    took = f"From nothing this took {human_seconds(MEASURED_SECONDS)} on {MEASURED_ON}"
    if any(not override.strip().startswith(PLACES) for override in overrides):
        took += ", with the packaged settings; how long yours take was not measured"
    console.print(f"{took}. What an earlier demo has finished in the same folder is not done again.")

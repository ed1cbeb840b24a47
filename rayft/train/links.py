"""Which steps each link of a chain trains."""

from __future__ import annotations

from rayft.data.loader import Schedule
from rayft.errors import ConfigError
from rayft.train.run import RunConfig

__all__ = ["spans"]


def spans(run: RunConfig, schedule: Schedule) -> list[tuple[int, int]]:
    """Give each link's steps as (first, end), counted from 0; one span where the method is no chain.

    Raises:
        ConfigError: if a link would begin after the last step, or have no step of its own.
    """
    steps, chain = run.optim.steps, run.method.chain
    if chain is None:
        return [(0, steps)]
    if chain.epochs is None:
        size = steps // chain.links
        return [(link * size, (link + 1) * size) for link in range(chain.links)]
    starts = [schedule.first_step(link * chain.epochs) for link in range(chain.links)]
    if starts[-1] >= steps:
        raise ConfigError(
            f"link {chain.links} of '{run.method.name}' would begin at step {starts[-1] + 1} of {steps}: "
            f"raise optim.steps to {schedule.first_step(chain.links * chain.epochs)}, or take fewer links or "
            "epochs"
        )
    if len(set(starts)) < len(starts):
        raise ConfigError(
            f"{chain.epochs} epochs are less than one step of {run.optim.rows_per_step} rows, so a link of "
            f"'{run.method.name}' would not train: raise method.chain.epochs, or lower optim.rows_per_step"
        )
    return list(zip(starts, [*starts[1:], steps], strict=True))

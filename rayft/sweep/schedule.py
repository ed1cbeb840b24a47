"""When trials are compared and stopped: ASHA, Li et al. 2020, arXiv:1810.05934."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayft.sweep.space import SweepConfig

if TYPE_CHECKING:
    from ray.tune.schedulers import ASHAScheduler

__all__ = ["asha", "rungs"]


def rungs(sweep: SweepConfig, steps: int) -> list[int]:
    """Give the steps at which a trial is compared: grace, grace·reduction, … below the last step."""
    found, step = [], sweep.grace
    while step < steps:
        found.append(step)
        step *= sweep.reduction
    return found


def asha(sweep: SweepConfig, steps: int) -> ASHAScheduler:
    """Make the scheduler: it stops on validation loss, at the rungs."""
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="step",
        metric="val_loss",
        mode="min",
        max_t=steps,
        grace_period=min(sweep.grace, steps),
        reduction_factor=sweep.reduction,
    )

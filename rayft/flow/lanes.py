"""Use lanes in a command: start them, save on an interrupt, close them, and report a lost process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import ray.exceptions

from rayft.errors import ResourceError
from rayft.flow.ahead import Ahead
from rayft.flow.cluster import check_fit, cluster
from rayft.flow.display import Display
from rayft.flow.sweep.preflight import Plan
from rayft.sweep.executor import EXECUTORS, Executor
from rayft.sweep.reasons import why_ended

__all__ = ["executor_for", "use_lanes"]


@contextmanager
def executor_for(plan: Plan, started: Ahead | None, lanes: int) -> Iterator[Executor]:
    """Yield the executor of a sweep's or run's jobs, in a cluster that lasts for the block.

    Args:
        plan: of the sweep, or of the run as a sweep of one trial.
        started: the cluster, and perhaps the lanes, that have been started for it.
        lanes: number of trials that run at the same time.

    Raises:
        ResourceError: if Ray can't be started, or this machine can't hold the workers.
    """
    sweep, scale, workers = plan.config.sweep, plan.run.scale, lanes * plan.run.scale.workers
    with ExitStack() as stack:
        executor = None
        if started is not None:
            executor = stack.enter_context(started.executor())
            # The log of a rehearsal is written here.
            (plan.output / "ray").mkdir(exist_ok=True)
            check_fit(workers, scale.device, scale.gpu_share)
        else:
            stack.enter_context(cluster(workers, device=scale.device, gpu_share=scale.gpu_share))
        yield executor or EXECUTORS[plan.executor](
            scale,
            str(plan.output / "ray"),
            lanes,
            sweep.restarts,
            plan.config.name,
            sweep.patience,
            plan.slots,
        )


@contextmanager
def use_lanes(
    executor: Executor, display: Display, interrupted: Callable[[Sequence[str]], None] = lambda _: None
) -> Iterator[None]:
    """Run a block that uses the lanes of an executor, and close the executor after it.

    If a KeyboardInterrupt ends the block, trials that are training save a checkpoint first.

    Args:
        executor: of the lanes.
        display: reports the interrupt.
        interrupted: called on an interrupt with the keys of the trials that are training. It is called before
            their checkpoints are waited for, because whoever sent the signal may kill this process before
            that.

    Raises:
        ResourceError: if a process that the lanes share has ended.
    """
    try:
        yield
    except KeyboardInterrupt:
        display.say(
            "interrupted: trials that are training save a checkpoint; press Ctrl-C again to stop at once"
        )
        saved, late = executor.interrupt(meanwhile=interrupted)
        if late:
            display.say(f"not saved in time: {', '.join(late)}; what follows their last checkpoints is lost")
        if saved or not late:
            display.say(f"saved: {', '.join(saved)}" if saved else "no trial was training")
        raise
    except ray.exceptions.RayError as error:
        raise ResourceError(
            f"a process that the lanes share has ended: {why_ended(error)}. Run the same command again: it "
            "continues from what is saved"
        ) from error
    finally:
        executor.close()

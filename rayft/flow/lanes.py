"""Use lanes in a command: save on an interrupt, close them at the end, and report a lost process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray.exceptions

from rayft.errors import ResourceError
from rayft.flow.display import Display
from rayft.sweep.executor import Executor
from rayft.sweep.reasons import why_ended

__all__ = ["use_lanes"]


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
        training = executor.interrupt(meanwhile=interrupted)
        display.say(f"saved: {', '.join(training)}" if training else "no trial was training")
        raise
    except ray.exceptions.RayError as error:
        raise ResourceError(
            f"a process that the lanes share has ended: {why_ended(error)}. Run the same command again: it "
            "continues from what is saved"
        ) from error
    finally:
        executor.close()

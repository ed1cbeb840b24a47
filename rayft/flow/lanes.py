"""Using lanes in a command: they are closed afterwards, and what ends them becomes one clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray.exceptions

from rayft.errors import ResourceError
from rayft.flow.display import Display
from rayft.sweep.executor import Executor
from rayft.sweep.launcher import why_ended

__all__ = ["at_work"]


@contextmanager
def at_work(
    executor: Executor, display: Display, interrupted: Callable[[Sequence[str]], None] = lambda _: None
) -> Iterator[None]:
    """Let the block use an executor's lanes, and end them after it.

    If a KeyboardInterrupt ends the block, trials that train save a checkpoint first.

    Args:
        executor: of the lanes.
        display: where is said what happens.
        interrupted: called at an interrupt with the trials that are training, before they are waited for: who
            sent the signal may not wait as long.

    Raises:
        ResourceError: if a process that the lanes share has ended.
    """
    try:
        yield
    except KeyboardInterrupt:
        display.say("interrupted: trials that train save a checkpoint; once more ends at once")
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

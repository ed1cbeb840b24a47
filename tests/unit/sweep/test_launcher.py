"""Why a process of Ray's ended, in a line; and a search that outlives Ray's memory monitor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray.exceptions
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from rayft.sweep.launcher import why_ended
from rayft.sweep.space import MethodSpace, SweepConfig
from rayft.sweep.tuner import _run_tune

OUT_OF_MEMORY = """8 worker(s) were killed due to the node running low on memory. Memory on the node \
(IP: 10.0.0.2, ID: 9131c1) was 11.94GB used / 23.59GB limit (0.506418)
OOM kill reason: Memory usage 12698775552B exceeded threshold of 12662634496B (50.0% of 25325268992B limit)
Ray killed 8 worker(s) based on the killing policy
Selected to kill: (Actor(99681b): job ID=01000000, task name=PreemptionWatcher.__init__, pid=17967)
Top 10 memory users: PID	MEM(GB)	COMMAND"""
DEAD = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR\nRay's advice"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ray.exceptions.OutOfMemoryError(OUT_OF_MEMORY), "the machine ran out of memory; lower sweep.lanes"),
        (ray.exceptions.ActorDiedError(), "its process was killed or crashed"),
        (WorkerHealthCheckFailedError(DEAD, failure=RuntimeError()), "its process was killed or crashed"),
        (
            WorkerHealthCheckFailedError(OUT_OF_MEMORY, failure=RuntimeError()),
            "the machine ran out of memory",
        ),
        (ValueError("first\nlast"), "ValueError: last"),
        (ValueError(), "ValueError: no reason was given"),
    ],
)
def test_a_reason_is_one_line(error: Exception, words: str) -> None:
    assert words in why_ended(error)
    assert "\n" not in why_ended(error)


class Tuner:
    """Ends as Tune does in the order of `ends`."""

    def __init__(self, ends: Iterator[Exception | None]) -> None:
        self._ends = ends

    def fit(self) -> None:
        if (end := next(self._ends)) is not None:
            raise RuntimeError("Tune ended") from end


def test_a_search_goes_on_after_ray_has_killed_a_trials_process_for_memory() -> None:
    full = ray.exceptions.OutOfMemoryError(OUT_OF_MEMORY)
    sweep = SweepConfig(methods={"lora": MethodSpace()}, restarts=2)

    def run(*ends: Exception | None) -> list[Exception | None]:
        """Return the ends that were not reached."""
        left = iter(ends)
        _run_tune(sweep, lambda: Tuner(left))  # type: ignore[arg-type,return-value]
        return list(left)

    assert run(full, full, None, full) == [full]
    with pytest.raises(ray.exceptions.OutOfMemoryError):
        run(full, full, full, None)
    with pytest.raises(RuntimeError, match="Tune ended"):
        run(ValueError("something else"), None)

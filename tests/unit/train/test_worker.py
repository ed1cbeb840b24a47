"""What two workers exchange."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.errors import DataError, RayftError
from rayft.train.worker import Worker
from tests.unit.train.workers import in_two_workers


def fail_on_one(rank: int) -> None:
    """Raise an error on the second worker, inside and outside of `together`."""
    worker = Worker(rank, 2)

    def read() -> None:
        with worker.together():
            if rank == 1:
                raise DataError("of worker 1")

    with pytest.raises(DataError, match="of worker 1") as raised:
        read()
    assert raised.value.everywhere
    assert not RayftError("of this worker alone").everywhere
    # They are still in step.
    assert worker.total(rank + 1) == [3]


def test_an_error_of_one_worker_is_raised_on_all(tmp_path: Path) -> None:
    in_two_workers(fail_on_one, tmp_path)

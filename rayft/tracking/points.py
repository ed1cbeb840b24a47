"""Which points of which metrics a server has, so that none is sent twice.

MLflow ignores a point that it has with the same time, step and value. A step that is trained again after a
crash, or a score that is recorded again, has another time. So a sender asks the server once what a run has,
and leaves that out.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric

from rayft.files import locked
from rayft.tracking.base import same_number
from rayft.tracking.spool import Record, UndeliveredError, slug

__all__ = ["Points"]

_WAIT = 5.0
"""Seconds to wait for another process that sends to the same run."""


@dataclass
class _Run:
    """The points that a run has on the server, as far as they were asked for."""

    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Metric → step → value."""
    unread: set[str] = field(default_factory=set)
    """Metrics whose history the server has and this process has not read."""


class Points:
    """What one sender knows of the points of runs.

    Args:
        folder: where senders of all processes take turns at a run: `<run>.turn` is locked by the one that
            sends, and names it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._me = secrets.token_hex(8).encode()
        self._runs: dict[str, _Run] = {}

    @contextmanager
    def turn(self, run_id: str, *, created: bool = False) -> Iterator[None]:
        """Hold the turn at a run for the length of a block.

        What is known of the run is forgotten where another sender had the last turn, or the last turn of this
        one ended in an error, after which the server may have anything.

        Args:
            run_id: the run.
            created: whether the run was created just now, and has no points.

        Raises:
            UndeliveredError: if another process holds the turn for seconds.
        """
        with locked(self._folder / f"{slug(run_id)}.turn", _WAIT) as descriptor:
            if descriptor is None:
                raise UndeliveredError(f"another process is sending to the run {run_id}")
            if os.pread(descriptor, len(self._me), 0) != self._me:
                self.forget(run_id)
                os.pwrite(descriptor, self._me, 0)
            if created:
                self._runs[run_id] = _Run()
            try:
                yield
            except BaseException:
                self.forget(run_id)
                raise

    def forget(self, run_id: str) -> None:
        """Forget what is known of a run, so that the server is asked again."""
        self._runs.pop(run_id, None)

    def new(self, client: MlflowClient, run_id: str, records: Sequence[Record]) -> list[Metric]:
        """Return the points of records that the run does not have, and take them for sent (within `turn`)."""
        found = []
        for record in records:
            whole, step = record["step"] is None, record["step"] or 0
            for name, value in record["values"].items():
                points = self._of(client, run_id, name)
                if step not in points or (whole and not same_number(points[step], value)):
                    points[step] = value
                    found.append(Metric(name, value, record["time"], step))
        return found

    def _of(self, client: MlflowClient, run_id: str, name: str) -> dict[int, float]:
        if run_id not in self._runs:
            self._runs[run_id] = _read(client, run_id)
        run = self._runs[run_id]
        if name in run.unread:
            history = client.get_metric_history(run_id, name)
            history = sorted(history, key=lambda point: (point.step, point.timestamp))
            run.values[name] = {point.step: point.value for point in history}
            run.unread.discard(name)
        return run.values.setdefault(name, {})


def _read(client: MlflowClient, run_id: str) -> _Run:
    """Ask which metrics a run has. One whose last step is 0 needs no history: that is its only step."""
    run = _Run()
    for last in client.get_run(run_id).data.to_proto().metrics:
        if last.step == 0:
            run.values[last.key] = {0: last.value}
        else:
            run.unread.add(last.key)
    return run

"""Delivering records to MLflow, each of them once.

MLflow ignores a point of a metric only if it has a point of the same time, step and value. A step that is
trained again after a crash, or a score that is recorded again, has another time. A sender therefore asks the
server once which points a run has, and does not send those again. Processes take turns at a run, so that what
one of them knows is not made out of date by another.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException, RestException
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAMS_TAGS_PER_BATCH

from rayft.errors import DiskFullError
from rayft.files import disk_full, disk_full_error, locked
from rayft.tracking.base import PENDING, Former, TrackerSpec, same_number
from rayft.tracking.connection import connect, experiment_id, local_folder
from rayft.tracking.runs import KEY_TAG, find_former, find_run
from rayft.tracking.spool import Record, UndeliveredError, slug
from rayft.tracking.view import VIEW_TAG, dataset_inputs, view

__all__ = ["Sender"]

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "interrupted": "KILLED", "failed": "FAILED"}
# MLflow shows a killed run in red, as it shows a failed one. This note on the run's page explains it.
_NOTES = {
    "stopped": "Stopped by the scheduler, as planned: after as many steps, other trials were ahead.",
    "interrupted": "Interrupted; the same command continues it.",
}
_NOTE_TAG, _STATUS_TAG = "mlflow.note.content", "rayft.status"
# Codes of requests that MLflow would refuse again. Any other failure (no answer, 5xx, missing rights) may be
# repaired, so the request is sent again.
_FINAL = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
_TURN_SECONDS = 5.0
"""Time to wait for another process that sends to the same run."""

_CREATE_SECONDS = 20.0
"""Time to wait for other processes that create runs: they hold the lock as long as the server takes."""

_log = logging.getLogger(__name__)

_Called = TypeVar("_Called", bound=Callable[..., Any])


def _naming_the_full_disk(called: _Called) -> _Called:
    """Make a method of `Sender` raise `DiskFullError` if MLflow is on this machine and its disk is full."""

    @wraps(called)
    def wrapped(sender: Sender, *args: Any, **kwargs: Any) -> Any:
        try:
            return called(sender, *args, **kwargs)
        except UndeliveredError as error:
            if error.full:
                raise disk_full_error(error, *sender.folders) from error
            raise

    return wrapped  # type: ignore[return-value]


class Sender:
    """Delivers records of a spool to MLflow. It connects when it first has something to send.

    Args:
        spec: as returned by `prepare`.
    """

    def __init__(self, spec: TrackerSpec) -> None:
        self._spec = spec
        self._connected: MlflowClient | None = None
        self._ids: dict[str, str] = {}
        self._points = _Points(spec.spool)
        self.folders = [local_folder(spec.uri) or spec.spool, spec.spool]

    @_naming_the_full_disk
    def deliver(self, records: Sequence[Record]) -> list[tuple[Record, str]]:
        """Send records in order; consecutive metrics of one run are sent in one request.

        Returns:
            The records that MLflow refused for good, each with the reason.

        Raises:
            UndeliveredError: if the server is away. Some of the records may have been sent.
            DiskFullError: if MLflow is on this machine and its disk is full.
        """
        refused: list[tuple[Record, str]] = []
        batch: list[Record] = []
        for record in records:
            if batch and (record["op"], record["run"]) != ("metrics", batch[0]["run"]):
                refused += self._metrics(batch)
                batch = []
            if record["op"] == "metrics":
                batch.append(record)
            else:
                refused += self._one(record)
        return refused + (self._metrics(batch) if batch else [])

    @_naming_the_full_disk
    def ensure(self, record: Record) -> tuple[str, bool]:
        """Find or create the run of a `run` record.

        Returns:
            The id of the run, and whether it was created.
        """
        with _undelivered():
            client, experiment = self._client(), self._experiment_id()
            tags = {**record["tags"], KEY_TAG: record["key"]}
            parent = self._resolve(record["parent"]) if record["parent"] else None
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
            # The lock makes the search and the creation one step for all processes of this host.
            with locked(self._spec.spool / "create.lock", _CREATE_SECONDS) as descriptor:
                if descriptor is None:
                    raise UndeliveredError("another process is creating a run")
                run_id = find_run(client, experiment, record["key"])
                if run_id is None and "former" in record:
                    run_id = find_former(client, experiment, Former(**record["former"]), parent)
                created = run_id is None
                if run_id is None:
                    run = client.create_run(experiment, record["time"], tags, record["name"])
                    run_id = str(run.info.run_id)
                else:
                    noted = [RunTag(name, value) for name, value in tags.items()]
                    client.log_batch(run_id, tags=noted, synchronous=True)
                    # A process of another machine may have sent to it since this one did.
                    self._points.forget(run_id)
            if created:
                with self._points.turn(run_id, created=True):
                    pass
        self._ids[PENDING + record["key"]] = run_id
        return run_id, created

    @_naming_the_full_disk
    def restart(self, run_id: str) -> None:
        """Set the status of a run that has ended to running, and remove what was noted about its end."""
        with _undelivered():
            client = self._client()
            tags = client.get_run(run_id).data.tags
            client.update_run(run_id, status="RUNNING")
            if _STATUS_TAG in tags:
                client.delete_tag(run_id, _STATUS_TAG)
            if tags.get(_NOTE_TAG) in _NOTES.values():
                client.delete_tag(run_id, _NOTE_TAG)

    @_naming_the_full_disk
    def find(self, run: str) -> str | None:
        """Return the id of a run on the server, or None if the server has no such run."""
        if run.startswith(PENDING) and run not in self._ids:
            with _undelivered():
                found = find_run(self._client(), self._experiment_id(), run.removeprefix(PENDING))
            if found is None:
                return None
            self._ids[run] = found
        return self._ids.get(run, run)

    def _one(self, record: Record) -> list[tuple[Record, str]]:
        try:
            with _undelivered():
                self._apply(record)
        except MlflowException as error:
            return self._refused([record], error, self._one)
        return []

    def _refused(
        self,
        records: Sequence[Record],
        error: MlflowException,
        send: Callable[[Record], list[tuple[Record, str]]],
    ) -> list[tuple[Record, str]]:
        """Send the parts of a refused request one by one, so that one bad value costs no other."""
        values = records[0].get("values", {})
        if len(records) > 1:
            parts = list(records)
        elif len(values) > 1:
            parts = [{**records[0], "values": {name: value}} for name, value in values.items()]
        else:
            _log.warning("MLflow refused %s: %s", dict(records[0]), error)
            return [(records[0], str(error))]
        return [refused for part in parts for refused in send(part)]

    def _apply(self, record: Record) -> None:
        if record["op"] == "run":
            run_id, created = self.ensure(record)
            if record.get("restart") and not created:
                self.restart(run_id)
            return
        client, run_id = self._client(), self._resolve(record["run"])
        if record["op"] == "params":
            self._params(client, run_id, record["values"])
        elif record["op"] == "artifact":
            self._artifact(client, run_id, Path(record["path"]), record["folder"] or None)
        elif record["op"] == "data":
            client.log_inputs(run_id, dataset_inputs(record))
        elif record["op"] == "view":
            self._view(client, run_id, record)
        elif record["op"] == "finish":
            self._finish(client, run_id, record)

    def _view(self, client: MlflowClient, run_id: str, record: Record) -> None:
        """Keep the view of a run, unless there is one, which a user may have changed."""
        experiment, tag = self._experiment_id(), VIEW_TAG + run_id
        if tag not in client.get_experiment(experiment).tags:
            client.set_experiment_tag(experiment, tag, view(run_id, record["name"], record["time"]))

    def _params(self, client: MlflowClient, run_id: str, values: Mapping[str, str]) -> None:
        try:
            _log_params(client, run_id, values)
        except MlflowException as error:
            known = client.get_run(run_id).data.params if error.error_code in _FINAL else {}
            changed = {name: value for name, value in values.items() if known.get(name, value) != value}
            if not changed:
                raise
            for name, value in changed.items():
                client.set_tag(run_id, f"changed.{name}", value)
            _log_params(client, run_id, {name: values[name] for name in values if name not in changed})

    def _finish(self, client: MlflowClient, run_id: str, record: Record) -> None:
        run, status = client.get_run(run_id), record["status"]
        if run.info.status != "RUNNING" and (
            record.get("if_running") or run.data.tags.get(_STATUS_TAG) == status
        ):
            return
        client.set_tag(run_id, _STATUS_TAG, status)
        if status in _NOTES:
            client.set_tag(run_id, _NOTE_TAG, _NOTES[status])
        client.set_terminated(run_id, _STATUS[status], record["time"])

    def _artifact(self, client: MlflowClient, run_id: str, path: Path, folder: str | None) -> None:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), folder)
        elif path.exists():
            client.log_artifact(run_id, str(path), folder)
        else:
            raise MlflowException.invalid_parameter_value(f"{path} was deleted before it could be sent")

    def _metrics(self, records: Sequence[Record]) -> list[tuple[Record, str]]:
        try:
            with _undelivered():
                client, run_id = self._client(), self._resolve(records[0]["run"])
                with self._points.turn(run_id):
                    for part in _parts(self._points.new(client, run_id, records), MAX_METRICS_PER_BATCH):
                        client.log_batch(run_id, metrics=part, synchronous=True)
        except MlflowException as error:
            return self._refused(records, error, lambda record: self._metrics([record]))
        return []

    def _resolve(self, run: str) -> str:
        found = self.find(run)
        if found is None:
            raise UndeliveredError(f"the run {run} is not created yet")
        return found

    def _client(self) -> MlflowClient:
        if self._connected is None:
            self._connected = connect(self._spec.uri)
        return self._connected

    def _experiment_id(self) -> str:
        if not self._spec.experiment_id:
            self._spec = replace(
                self._spec, experiment_id=experiment_id(self._client(), self._spec.experiment)
            )
        return self._spec.experiment_id


@dataclass
class _Known:
    """The points that a run has on the server, as far as the server was asked for them."""

    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Metric → step → value."""
    unread: set[str] = field(default_factory=set)
    """Metrics whose history is on the server and was not read yet."""


class _Points:
    """The points that one sender knows the server to have.

    Args:
        folder: folder of the files by which the senders of all processes take turns. The sender whose turn it
            is holds the lock of `<run>.turn`, and the file holds the name of the last sender.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._me = secrets.token_hex(8).encode()
        self._runs: dict[str, _Known] = {}

    @contextmanager
    def turn(self, run_id: str, *, created: bool = False) -> Iterator[None]:
        """Hold the turn at a run for the length of a block.

        What is known of the run is forgotten if another sender had the last turn, and if a block ends in an
        error, after which the server may have any part of what was sent.

        Args:
            run_id: the run.
            created: whether the run was created just now and has no points.

        Raises:
            UndeliveredError: if another process holds the turn for `_TURN_SECONDS`.
        """
        with locked(self._folder / f"{slug(run_id)}.turn", _TURN_SECONDS) as descriptor:
            if descriptor is None:
                raise UndeliveredError(f"another process is sending to the run {run_id}")
            if os.pread(descriptor, len(self._me), 0) != self._me:
                self.forget(run_id)
                os.pwrite(descriptor, self._me, 0)
            if created:
                self._runs[run_id] = _Known()
            try:
                yield
            except BaseException:
                self.forget(run_id)
                raise

    def forget(self, run_id: str) -> None:
        """Forget the points of a run, so that the server is asked for them again."""
        self._runs.pop(run_id, None)

    def new(self, client: MlflowClient, run_id: str, records: Sequence[Record]) -> list[Metric]:
        """Return the points of `records` that the run does not have, and count them as sent.

        Called within `turn`, and followed by sending them.
        """
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


def _read(client: MlflowClient, run_id: str) -> _Known:
    """Ask the server which metrics a run has. A metric whose last step is 0 has no other step to read."""
    known = _Known()
    for last in client.get_run(run_id).data.to_proto().metrics:
        if last.step == 0:
            known.values[last.key] = {0: last.value}
        else:
            known.unread.add(last.key)
    return known


@contextmanager
def _undelivered() -> Iterator[None]:
    """Turn errors that may pass with time into `UndeliveredError`; let final refusals through."""
    try:
        yield
    except MlflowException as error:
        if error.error_code in _FINAL:
            raise
        # Of a server whose disk is full, only the server's operator can know: it counts as away.
        full = disk_full(error) and not isinstance(error, RestException)
        raise UndeliveredError(str(error), full=full) from error
    except (UndeliveredError, DiskFullError):
        raise
    # MLflow lets through whatever its drivers and stores raise, and none of it may end a training.
    except Exception as error:
        raise UndeliveredError(f"{type(error).__name__}: {error}", full=disk_full(error)) from error


def _log_params(client: MlflowClient, run_id: str, values: Mapping[str, str]) -> None:
    params = [Param(name, value) for name, value in values.items()]
    for part in _parts(params, MAX_PARAMS_TAGS_PER_BATCH):
        client.log_batch(run_id, params=part, synchronous=True)


def _parts(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]

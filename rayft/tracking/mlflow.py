"""Tracking in MLflow: many processes write to explicit run ids, and a server may be away.

Every write goes to the spool first and is sent by a thread; what can't be sent stays there and is
sent later, by the thread, by `close`, or by `flush_spool`. Repeats do no harm: what a run has of a metric
is asked once and left out (`rayft.tracking.points`), and a param keeps its first value.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Self, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Param, RunTag
from mlflow.exceptions import MlflowException, RestException
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

from rayft.errors import DiskFullError, TrackingError
from rayft.files import disk_full, disk_full_error, locked
from rayft.tracking.base import PENDING, Former, RunStatus, TrackerSpec
from rayft.tracking.connection import (
    KEY_TAG,
    connect,
    experiment_id,
    find_former,
    find_run,
    find_trained,
    local_folder,
    prepare,
)
from rayft.tracking.points import Points
from rayft.tracking.spool import Drained, Record, Spool, UndeliveredError, slug

__all__ = ["MlflowTracker", "find_adapter", "flush_spool", "prepare", "resolve_runs"]

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "interrupted": "KILLED", "failed": "FAILED"}
# MLflow shows a killed run in red, as a failed one; its page says this.
_NOTES = {
    "stopped": "Stopped by the scheduler, as planned: after as many steps, other trials were ahead.",
    "interrupted": "Interrupted; the same command continues it.",
}
_NOTE_TAG, _STATUS_TAG = "mlflow.note.content", "rayft.status"
# What MLflow will refuse tomorrow too. All else (no answer, 5xx, no rights) may be mended: it is sent again.
_FINAL = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")

_log = logging.getLogger(__name__)

_Called = TypeVar("_Called", bound=Callable[..., Any])


def _naming_the_full_disk(called: _Called) -> _Called:
    """Make a method of `_Sender` raise `DiskFullError` where MLflow is here, and its disk is full."""

    @wraps(called)
    def wrapped(sender: _Sender, *args: Any, **kwargs: Any) -> Any:
        try:
            return called(sender, *args, **kwargs)
        except UndeliveredError as error:
            if error.full:
                raise disk_full_error(error, *sender.folders) from error
            raise

    return wrapped  # type: ignore[return-value]


def flush_spool(spec: TrackerSpec, timeout: float = 60.0) -> Drained:
    """Send what any process, living or killed, left in the spool; delete what is delivered.

    Args:
        spec: as `prepare` gave it.
        timeout: seconds after which no further batch is begun.

    Returns:
        What was sent, what is still pending (the server is away), what MLflow refused for good.

    Raises:
        DiskFullError: if the disk is full that the spool, or MLflow on this machine, writes to.
    """
    return _flush(spec, _Sender(spec), timeout)


def _flush(spec: TrackerSpec, sender: _Sender, timeout: float) -> Drained:
    spool = Spool(spec.spool)
    deadline, done, moved = time.monotonic() + timeout, Drained(), True
    files = spool.files()
    # A file may wait for a run that another file creates, so go round while anything moves.
    while files and moved and time.monotonic() < deadline:
        left, moved = [], False
        for path in files:
            if time.monotonic() >= deadline:
                left.append(path)
                continue
            result = spool.drain(path, sender.deliver, wait=5.0, remove=True)
            done += replace(result, pending=0)
            moved = moved or bool(result.sent or result.rejected)
            if result.pending:
                left.append(path)
        files = left
    return done + Drained(pending=sum(spool.pending(path) for path in files))


def resolve_runs(spec: TrackerSpec, run_ids: Collection[str]) -> dict[str, str]:
    """Return the id that each run has on the server.

    A run that was begun while MLflow was away has the id `key:<key>` until it is created there. Where there
    is such an id, what waits in the spool is sent first. An id stays what it is while MLflow is away.

    Args:
        spec: as `prepare` gave it.
        run_ids: ids of either kind; empty ones are allowed.

    Returns:
        Each of `run_ids` → its id on the server, as far as it has one.
    """
    found = {run_id: run_id for run_id in run_ids}
    pending = [run_id for run_id in found if run_id.startswith(PENDING)]
    if not pending:
        return found
    sender = _Sender(spec)
    try:
        sender.find(pending[0])  # A server that is away is asked once, not for each file.
        _flush(spec, sender, 60.0)
        for run_id in pending:
            found[run_id] = sender.find(run_id) or run_id
    except (UndeliveredError, MlflowException) as error:
        _log.debug("runs can't be looked up: %s", error)
    return found


def find_adapter(spec: TrackerSpec, hashes: Sequence[str]) -> str:
    """Find the run that trained an adapter with one of these content hashes; empty if there is none.

    What waits in the spool is sent first, since that may create the run.

    Args:
        spec: as `prepare` gave it.
        hashes: in the order of preference.
    """
    flush_spool(spec)
    client = connect(spec.uri)
    found = (find_trained(client, spec.experiment_id, content_hash) for content_hash in hashes)
    return next((run for run in found if run is not None), "")


class MlflowTracker:
    """A `Tracker` on MLflow. Build one in each process that writes, and close it.

    Args:
        spec: as `prepare` gave it.
        interval: seconds between two sends; metrics of that time travel together.
    """

    def __init__(self, spec: TrackerSpec, interval: float = 1.0) -> None:
        self._spec = spec
        self._interval = interval
        self._spool = Spool(spec.spool)
        self._sender = _Sender(spec)
        self._files: dict[Path, tuple[str, ...]] = {}
        """This process's file of a run → the ids that the run has or had."""
        self._pending_ids: dict[str, str] = {}
        """Id of a run → the one that it had, or would have had, before it was created."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._full: DiskFullError | None = None
        """Why the thread could not send: whoever writes next is told."""

    def run(
        self,
        name: str,
        key: str,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        former: Former | None = None,
        *,
        restart: bool = True,
    ) -> str:
        """Create the run of this key, or find it again.

        What an earlier process left of it in the spool is sent first. While MLflow is away the id is
        `key:<key>`, good for every method here; the run is created later, and `resolve_runs` finds its id.
        """
        record: dict[str, Any] = {"op": "run", "name": name, "key": key, "parent": parent}
        record |= {"tags": dict(tags or {}), "time": _now(), "restart": restart}
        if former is not None:
            record["former"] = {"key": former.key, "params": dict(former.params)}
        try:
            if parent is not None and parent.startswith(PENDING):
                self._send_earlier(parent)
            run_id, created = self._sender.ensure(record)
            if not created:
                self._send_earlier(run_id, PENDING + key)
                if restart:
                    self._sender.restart(run_id)
        except UndeliveredError:
            self._write(PENDING + key, record)
            return PENDING + key
        self._pending_ids[run_id] = PENDING + key
        return run_id

    def params(self, run_id: str, values: Mapping[str, str]) -> None:
        """Record settings; a value above MLflow's limit is cut and ends in `[cut: N characters]`."""
        self._write(
            run_id, {"op": "params", "values": {name: _cut(str(text)) for name, text in values.items()}}
        )

    def metrics(self, run_id: str, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers at a step, or of the whole run; returns once they are on disk here."""
        numbers = {name: float(value) for name, value in values.items()}
        self._write(run_id, {"op": "metrics", "values": numbers, "step": step})

    def artifact(self, run_id: str, path: str | Path, folder: str = "") -> None:
        """Store a file, or what a folder holds, below `folder` of the run.

        Raises:
            TrackingError: if nothing is there.
        """
        path = Path(path).absolute()
        if not path.exists():
            raise TrackingError(f"there is no file or folder at {path} to track; write it first")
        self._write(run_id, {"op": "artifact", "path": str(path), "folder": folder})

    def finish(self, run_id: str, status: RunStatus = "finished", *, if_running: bool = False) -> None:
        """Record how the run ended, and send at once."""
        self._write(run_id, {"op": "finish", "status": status, "if_running": if_running})
        self._wake.set()

    def close(self, timeout: float = 15.0) -> Drained:
        """Try once more to send what is left, for up to `timeout` seconds; the rest stays in the spool.

        Returns:
            With `pending`, the number of records that `flush_spool` has still to send.
        """
        atexit.unregister(self.close)
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)
        return Drained(pending=sum(self._spool.pending(path) for path in self._files))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, run_id: str, record: Record) -> None:
        with self._lock:
            if self._full is not None:
                raise self._full
            self._spool.append(run_id, {"run": run_id, "time": _now(), **record})
            ids = (run_id, *filter(None, [self._pending_ids.get(run_id)]))
            self._files[self._spool.path(run_id)] = ids
            if self._thread is None or not self._thread.is_alive():
                self._closing.clear()
                self._thread = threading.Thread(target=self._send, name="rayft-tracking", daemon=True)
                self._thread.start()
                atexit.register(self.close)

    def _send(self) -> None:
        pause, away = self._interval, False
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            closing = self._closing.is_set()
            left = self._drained(last=closing)
            # Without a reason, another process or thread is sending the file just now.
            if left.reason and not away and self._full is None:
                _log.warning(
                    "MLflow is away; what is tracked waits in %s (%s)", self._spool.folder, left.reason
                )
            elif away and not left.reason:
                _log.info("MLflow is back; what had waited was sent")
            away = bool(left.reason)
            pause = min(pause * 2, 30.0) if away else self._interval
            if closing:
                return

    def _drained(self, *, last: bool) -> Drained:
        """Drain, and keep the error of a full disk for the next that writes."""
        try:
            done = self._drain(last=last)
        except DiskFullError as error:
            self._full = error
            return Drained(pending=1, reason=str(error))
        self._full = None
        return done

    def _drain(self, *, last: bool) -> Drained:
        with self._lock:
            files = dict(self._files)
        foreign = [path for path in self._spool.folder.glob("*.jsonl") if path not in files]
        done = Drained()
        for path, ids in sorted(files.items()):
            names = tuple(f"{slug(run)}." for run in ids)
            if any(other.name.startswith(names) for other in foreign):
                # What a killed process left of the run goes first, or its end would come after this one's.
                of_run = self._spool.files(*ids)
                for earlier in of_run[: of_run.index(path)] if path in of_run else ():
                    done += self._drain_one(earlier, last=last)
            done += self._drain_one(path, last=last)
        return done

    def _drain_one(self, path: Path, *, last: bool) -> Drained:
        remove = last or path not in self._files
        return self._spool.drain(path, self._sender.deliver, wait=5.0 if last else 0.0, remove=remove)

    def _send_earlier(self, *ids: str) -> None:
        """Send all that the spool has of a run.

        Raises:
            UndeliveredError: if that can't be done now.
        """
        for path in self._spool.files(*ids):
            result = self._spool.drain(path, self._sender.deliver, wait=5.0, remove=path not in self._files)
            if result.pending:
                raise UndeliveredError(result.reason)


class _Sender:
    """Delivers records to MLflow, connecting when it has to."""

    def __init__(self, spec: TrackerSpec) -> None:
        self._spec = spec
        self._connected: MlflowClient | None = None
        self._ids: dict[str, str] = {}
        self._points = Points(spec.spool)
        self.folders = [local_folder(spec.uri) or spec.spool, spec.spool]

    @_naming_the_full_disk
    def deliver(self, records: Sequence[Record]) -> list[tuple[Record, str]]:
        """Send records in order; neighbouring metrics of one run travel together."""
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
        """Find or create the run of a `run` record; return its id and whether it is new."""
        with _undelivered():
            client, experiment = self._client(), self._experiment_id()
            tags = {**record["tags"], KEY_TAG: record["key"]}
            parent = self._resolve(record["parent"]) if record["parent"] else None
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
            # Searching and creating is one step for all processes of this host.
            with locked(self._spec.spool / "create.lock"):
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
                    # Since this process sent to it, one of another machine may have.
                    self._points.forget(run_id)
            if created:
                with self._points.turn(run_id, created=True):
                    pass
        self._ids[PENDING + record["key"]] = run_id
        return run_id, created

    @_naming_the_full_disk
    def restart(self, run_id: str) -> None:
        """Set a run running that has ended, and take back what was said of its end."""
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
        """Return the id of a run on the server; None if it has no such run."""
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
        """Send the parts of what was refused on their own, so that one bad value costs no other."""
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
        elif record["op"] == "finish":
            self._finish(client, run_id, record)

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


@contextmanager
def _undelivered() -> Iterator[None]:
    """Turn what time may mend into `UndeliveredError`; let final refusals through."""
    try:
        yield
    except MlflowException as error:
        if error.error_code in _FINAL:
            raise
        # A server's full disk is the server's: it is away until that is mended.
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


def _cut(text: str) -> str:
    if len(text) <= MAX_PARAM_VAL_LENGTH:
        return text
    note = f"... [cut: {len(text)} characters]"
    return text[: MAX_PARAM_VAL_LENGTH - len(note)] + note


def _now() -> int:
    return time.time_ns() // 1_000_000

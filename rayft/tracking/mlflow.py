"""Tracking in MLflow: many processes write to explicit run ids, and the server may be away.

Every write goes to the spool first, and a thread sends it from there. What cannot be sent stays in the spool
and is sent later: by the thread, by `close`, or by `flush_spool`. Sending a record twice does no harm: points
that a run already has are left out (`rayft.tracking.sender`), and a parameter keeps its first value.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

from rayft.errors import DiskFullError, TrackingError
from rayft.tracking.base import PENDING, Former, RunStatus, TrackerSpec
from rayft.tracking.connection import connect, prepare
from rayft.tracking.runs import find_trained
from rayft.tracking.sender import Sender
from rayft.tracking.spool import Drained, Record, Spool, UndeliveredError, slug

__all__ = ["MlflowTracker", "find_adapter", "flush_spool", "prepare", "resolve_runs"]

_log = logging.getLogger(__name__)


def flush_spool(spec: TrackerSpec, timeout: float = 60.0) -> Drained:
    """Send what all processes, running or killed, left in the spool, and delete what was delivered.

    Args:
        spec: as returned by `prepare`.
        timeout: seconds after which no further batch is begun.

    Returns:
        How many records were sent, how many are still pending because the server is away, and how many MLflow
        refused for good.

    Raises:
        DiskFullError: if the disk is full that the spool, or MLflow on this machine, writes to.
    """
    return _flush(spec, Sender(spec), timeout)


def _flush(spec: TrackerSpec, sender: Sender, timeout: float) -> Drained:
    spool = Spool(spec.spool)
    deadline, done, moved = time.monotonic() + timeout, Drained(), True
    files = spool.files()
    # A file may wait for a run that another file creates, so repeat while anything could be sent.
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

    A run that was begun while MLflow was away has the id `key:<key>` until it is created there. If there is
    such an id among `run_ids`, the spool is sent first. While MLflow is away, ids are returned unchanged.

    Args:
        spec: as returned by `prepare`.
        run_ids: ids of either kind; empty ones are allowed.

    Returns:
        Each of `run_ids` → its id on the server, or itself if it has none there.
    """
    found = {run_id: run_id for run_id in run_ids}
    pending = [run_id for run_id in found if run_id.startswith(PENDING)]
    if not pending:
        return found
    sender = Sender(spec)
    try:
        sender.find(pending[0])  # If the server is away, this fails once, before each file would.
        _flush(spec, sender, 60.0)
        for run_id in pending:
            found[run_id] = sender.find(run_id) or run_id
    except (UndeliveredError, MlflowException) as error:
        _log.debug("cannot look up runs: %s", error)
    return found


def find_adapter(spec: TrackerSpec, hashes: Sequence[str]) -> str:
    """Return the id of the run that trained an adapter with one of these content hashes; empty if none did.

    The spool is sent first, since that may create the run.

    Args:
        spec: as returned by `prepare`.
        hashes: in the order of preference.
    """
    flush_spool(spec)
    client = connect(spec.uri)
    found = (find_trained(client, spec.experiment_id, content_hash) for content_hash in hashes)
    return next((run for run in found if run is not None), "")


class MlflowTracker:
    """A `Tracker` that writes to MLflow. Create one in each process that writes, and close it.

    Args:
        spec: as returned by `prepare`.
        interval: seconds between two sends; the metrics recorded in between are sent in one request.
    """

    def __init__(self, spec: TrackerSpec, interval: float = 1.0) -> None:
        self._spec = spec
        self._interval = interval
        self._spool = Spool(spec.spool)
        self._sender = Sender(spec)
        self._files: dict[Path, tuple[str, ...]] = {}
        """This process's spool file of a run → the ids that the run has or had."""
        self._pending_ids: dict[str, str] = {}
        """Id of a run → the `key:` id that it has, or would have, before it is created."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._full: DiskFullError | None = None
        """The error of the thread that found the disk full; the next write raises it."""

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
        """Create the run of this key, or find it again, and return its id.

        If an earlier process left records of the run in the spool, they are sent first. While MLflow is away,
        the id is `key:<key>`, which every method accepts; the run is created later, and `resolve_runs`
        returns its id on the server.
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
        """Record settings; a value longer than MLflow allows is cut and ends in `[cut: N characters]`."""
        self._write(
            run_id, {"op": "params", "values": {name: _cut(str(text)) for name, text in values.items()}}
        )

    def metrics(self, run_id: str, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers at a step, or of the whole run; return once they are in the spool on this disk."""
        numbers = {name: float(value) for name, value in values.items()}
        self._write(run_id, {"op": "metrics", "values": numbers, "step": step})

    def artifact(self, run_id: str, path: str | Path, folder: str = "") -> None:
        """Store a file, or the files of a folder, below `folder` of the run.

        Raises:
            TrackingError: if there is no such file or folder.
        """
        path = Path(path).absolute()
        if not path.exists():
            raise TrackingError(f"there is no file or folder at {path} to track; write it first")
        self._write(run_id, {"op": "artifact", "path": str(path), "folder": folder})

    def data(self, run_id: str, name: str, source: str, parts: Mapping[str, tuple[str, int]]) -> None:
        """Record the data that a run uses.

        Args:
            run_id: the run.
            name: of the data.
            source: where it is from, in one word.
            parts: `train`, `val`, `test` → digest and number of examples.
        """
        # MLflow takes names of up to 500 characters, and the end of a path says more than its beginning.
        record = {"op": "data", "name": name[-500:], "source": source, "parts": dict(parts)}
        self._write(run_id, record)

    def view(self, run_id: str, name: str) -> None:
        """Let MLflow's UI show the runs below a run as a table, under a name (see `rayft.tracking.view`)."""
        self._write(run_id, {"op": "view", "name": name})

    def finish(self, run_id: str, status: RunStatus = "finished", *, if_running: bool = False) -> None:
        """Record how the run ended, and send that without waiting for the interval."""
        self._write(run_id, {"op": "finish", "status": status, "if_running": if_running})
        self._wake.set()

    def close(self, timeout: float = 15.0) -> Drained:
        """Try once more to send what is pending, for up to `timeout` seconds; the rest stays in the spool.

        Returns:
            How many records are pending, which `flush_spool` will send.
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
            # Pending records without a reason are being sent by another process or thread.
            if left.reason and not away and self._full is None:
                _log.warning(
                    "MLflow is away; tracked data is kept in %s until it is back (%s)",
                    self._spool.folder,
                    left.reason,
                )
            elif away and not left.reason:
                _log.info("MLflow is back; the tracked data that was kept has been sent")
            away = bool(left.reason)
            pause = min(pause * 2, 30.0) if away else self._interval
            if closing:
                return

    def _drained(self, *, last: bool) -> Drained:
        """Drain, and keep the error of a full disk for the next write to raise."""
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
                # Records of a killed process are sent first, or its end of the run would be recorded last.
                of_run = self._spool.files(*ids)
                for earlier in of_run[: of_run.index(path)] if path in of_run else ():
                    done += self._drain_one(earlier, last=last)
            done += self._drain_one(path, last=last)
        return done

    def _drain_one(self, path: Path, *, last: bool) -> Drained:
        remove = last or path not in self._files
        return self._spool.drain(path, self._sender.deliver, wait=5.0 if last else 0.0, remove=remove)

    def _send_earlier(self, *ids: str) -> None:
        """Send all records of a run that the spool has.

        Args:
            ids: the ids that the run has or had.

        Raises:
            UndeliveredError: if that is not possible now.
        """
        for path in self._spool.files(*ids):
            result = self._spool.drain(path, self._sender.deliver, wait=5.0, remove=path not in self._files)
            if result.pending:
                raise UndeliveredError(result.reason)


def _cut(text: str) -> str:
    if len(text) <= MAX_PARAM_VAL_LENGTH:
        return text
    note = f"... [cut: {len(text)} characters]"
    return text[: MAX_PARAM_VAL_LENGTH - len(note)] + note


def _now() -> int:
    """Return the time in milliseconds, as MLflow records it."""
    return time.time_ns() // 1_000_000

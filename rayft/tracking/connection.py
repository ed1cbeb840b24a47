"""Opening MLflow: create or migrate it once, connect to it, and fail within seconds if it is away."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rayft.environment import environment
from rayft.errors import RayftError, TrackingError
from rayft.files import disk_full, disk_full_error, locked, write_large_file
from rayft.paths import check_file, check_folder
from rayft.tracking.base import TrackerSpec, redacted
from rayft.tracking.view import EXPERIMENT_TAGS

__all__ = [
    "SECONDS_TO_ANSWER",
    "VARIABLES",
    "away",
    "check",
    "connect",
    "experiment_id",
    "local_folder",
    "prepare",
]

SECONDS_TO_ANSWER = 8
"""Time in which a server must answer before anything is started."""

VARIABLES = {
    # MLflow's defaults (7 retries, 120 s each) would hold a trial for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    # Progress bars and links for every trial would bury what a sweep prints.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Environment variables that MLflow reads, unless the user has set them."""

_MIGRATING = threading.Lock()
"""Held by the thread that prepares a database, because Alembic keeps the one that it migrates in a global."""
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

_log = logging.getLogger(__name__)


def prepare(spec: TrackerSpec) -> TrackerSpec:
    """Create or migrate the database, and create the experiment if there is none.

    Call it once, before any process writes.

    Returns:
        The spec with the id of the experiment.

    Raises:
        TrackingError: within about ten seconds, if the server is away or refuses.
    """
    _log.debug("preparing %s", redacted(spec.uri))
    check(spec)
    spec.spool.mkdir(parents=True, exist_ok=True)
    with _MIGRATING, _impatient(), locked(spec.spool / "prepare.lock"), _errors(spec.uri), _quiet_import():
        location, file = None, _sqlite(spec.uri)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            location = (file.parent / "artifacts").as_uri()
            with locked(file):
                _create(file)
                _migrate(file)
        client = connect(spec.uri)
        identity = experiment_id(client, spec.experiment, location)
    return replace(spec, experiment_id=identity)


def check(spec: TrackerSpec) -> None:
    """Check that runs can be tracked where the spec says, without creating anything there.

    Raises:
        TrackingError: within about ten seconds, if the server is away, or the file is not a database.
        ResourceError: if the spool or the folder of the database cannot be written.
    """
    check_folder(spec.spool, "output")
    file = _sqlite(spec.uri)
    if file is not None:
        if file.exists():
            _checked(spec.uri)
        # SQLite writes a journal beside the file.
        check_folder(file.parent, "tracking.uri or MLFLOW_TRACKING_URI")
        if file.exists():
            check_file(file, "tracking.uri or MLFLOW_TRACKING_URI")
    elif spec.uri.startswith(("http:", "https:")):
        with _impatient(), _errors(spec.uri):
            connect(spec.uri).search_experiments(max_results=1)
    else:
        _checked(spec.uri)


def connect(uri: str) -> MlflowClient:
    """Return a client whose requests answer or fail within seconds. It does not retry; callers do.

    Raises:
        TrackingError: if the server or database does not answer, the file is missing or not a database, or
            the URI is not one of MLflow.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    _checked(uri)
    with _errors(uri), _quiet_import():
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _impatient() -> AbstractContextManager[None]:
    return environment(
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(SECONDS_TO_ANSWER)
    )


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Hide a warning about MLflow 3.17, whose tables have an option that SQLAlchemy 2.1 deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _create(file: Path) -> None:
    """Create the tables of a database that has none, all or none of them, whenever the process ends.

    MLflow would create them one by one in the file itself, and it can't use a file that has some of them.
    """
    from mlflow.store.db.utils import _initialize_tables

    if file.stat().st_size == 0:
        write_large_file(file, lambda staging: _change(staging, _initialize_tables))


def _migrate(file: Path) -> None:
    """Migrate a database that an older MLflow made, and keep a copy of it."""
    from mlflow.store.db.utils import _get_latest_schema_revision, _upgrade_db

    # SQLite migrations are not transactional: one that fails half-way leaves no usable file. The file itself
    # is migrated, since other processes may have opened it.
    whole = file.with_name(f"{file.name}.migrating")
    if whole.is_file():
        shutil.copyfile(whole, file)
    with contextlib.closing(sqlite3.connect(file)) as database:
        try:
            made_by = database.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.DatabaseError:
            made_by = None
    if made_by is None or made_by[0] == _get_latest_schema_revision():
        return
    write_large_file(whole, lambda staging: shutil.copyfile(file, staging))
    _change(file, _upgrade_db)
    whole.replace(file.with_name(f"{file.name}.before-migration"))


def _change(file: Path, change: Callable[[Any], object]) -> None:
    from mlflow.store.db.utils import create_sqlalchemy_engine

    engine = create_sqlalchemy_engine(f"sqlite:///{file}")
    try:
        change(engine)
    finally:
        engine.dispose()


def experiment_id(client: MlflowClient, name: str, location: str | None = None) -> str:
    """Return the id of an experiment, which is created if there is none of this name.

    Args:
        client: of the server.
        name: of the experiment.
        location: URI of the folder for the files of a new experiment; None leaves it to the server.

    Raises:
        TrackingError: if the experiment was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, location, EXPERIMENT_TAGS))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
            assert found is not None
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the MLflow experiment '{name}' was deleted; choose another tracking.experiment, or run "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    return str(found.experiment_id)


def _checked(uri: str) -> None:
    """Raise an error within seconds if a file, server or database does not answer; MLflow takes minutes."""
    from mlflow.store.db.utils import create_sqlalchemy_engine

    with _errors(uri):
        file, parts = _sqlite(uri), urlsplit(uri)
        kind = parts.scheme.split("+")[0]
        if file is not None:
            _open_file(file)
        elif kind in ("http", "https"):
            _wait_for_answer(uri)
        elif kind in _PORTS and parts.hostname:
            place = (parts.hostname, parts.port or _PORTS[kind])
            socket.create_connection(place, timeout=SECONDS_TO_ANSWER).close()
            engine = create_sqlalchemy_engine(uri)
            engine.connect().close()
            engine.dispose()


def _open_file(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} {'is a folder, not a file' if file.is_dir() else 'is not there'}")
    # Not read-only: after a process was killed in the middle of a write, the next one undoes the write.
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True)) as database:
        try:
            database.execute("PRAGMA schema_version").fetchone()
        except sqlite3.OperationalError as error:
            # A writer may hold the lock for a moment. MLflow waits for it.
            if "locked" not in str(error):
                raise


def _wait_for_answer(url: str) -> None:
    """Raise an error if a server does not answer at all.

    A refused connection and answers of any kind pass: the errors of MLflow's client say more about those.
    """
    try:
        with contextlib.suppress(httpx.NetworkError, httpx.ProtocolError, httpx.UnsupportedProtocol):
            httpx.get(url, timeout=SECONDS_TO_ANSWER)
    except httpx.TimeoutException as error:
        raise TimeoutError(f"no answer within {SECONDS_TO_ANSWER} seconds") from error
    except httpx.InvalidURL as error:
        raise ValueError(f"not a URL: {error}") from error


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turn every exception of MLflow and its drivers into a `TrackingError`."""
    try:
        yield
    except RayftError:
        raise
    # MLflow lets through whatever its drivers raise, SQLAlchemy's errors among them.
    except Exception as error:
        raise away(uri, error) from error


def _sqlite(uri: str) -> Path | None:
    return Path(uri.partition(":///")[2]) if uri.startswith("sqlite") else None


def local_folder(uri: str) -> Path | None:
    """Return the folder of the sqlite file that a URI names, or None if it names a server."""
    file = _sqlite(uri)
    return None if file is None else file.parent


def away(uri: str, error: Exception) -> RayftError:
    """Return the error for an MLflow that is away or refuses, with what to do about it.

    If MLflow writes to a file on this machine and the disk is full, that is a `DiskFullError`.
    """
    folder = local_folder(uri)
    if folder is not None and disk_full(error):
        return disk_full_error(error, folder)
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, ImportError):
        remedy = "install the driver of that database"
    elif _sqlite(uri) is not None:
        remedy = "correct tracking.uri or MLFLOW_TRACKING_URI, or set neither to track in the output folder"
    else:
        remedy = (
            "start it, correct tracking.uri or MLFLOW_TRACKING_URI, or set neither to track in a sqlite file"
        )
    return TrackingError(f"MLflow at {redacted(uri)} can't be used: {remedy} ({reason})")

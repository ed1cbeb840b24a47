"""Opening MLflow: fast to fail, created and migrated by one process, found again by key."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sqlite3
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rayft.errors import RayftError, TrackingError
from rayft.files import disk_full, disk_full_error, locked
from rayft.paths import check_file, check_folder
from rayft.tracking.base import Former, TrackerSpec, redacted

__all__ = [
    "HASH_PARAM",
    "KEY_TAG",
    "away",
    "check",
    "connect",
    "experiment_id",
    "find_former",
    "find_run",
    "find_trained",
    "local_folder",
    "prepare",
]

KEY_TAG = "rayft.key"
"""Tag that a run is found again by."""
HASH_PARAM = "adapter_hash"
"""Parameter of a trial's run: content hash of the adapter that came out."""

_SECONDS_TO_ANSWER = 8
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

_log = logging.getLogger(__name__)


def prepare(spec: TrackerSpec) -> TrackerSpec:
    """Create or migrate the database and the experiment; called once, before anybody else writes.

    Two processes that create one database at the same time can leave it broken.

    Raises:
        TrackingError: within about ten seconds, if the server is away or refuses.
    """
    _log.debug("preparing %s", redacted(spec.uri))
    check(spec)
    spec.spool.mkdir(parents=True, exist_ok=True)
    with _impatient(), locked(spec.spool / "prepare.lock"), _errors(spec.uri):
        location, file = None, _sqlite(spec.uri)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            location = (file.parent / "artifacts").as_uri()
            # An empty file is a database without tables, which MLflow makes.
            file.touch()
            _migrate(file)
        client = connect(spec.uri)
        identity = experiment_id(client, spec.experiment, location)
    return replace(spec, experiment_id=identity)


def check(spec: TrackerSpec) -> None:
    """Check that what is tracked can be written where the spec says, before anything is made there.

    Raises:
        TrackingError: within about ten seconds, if the server is away, or a file is no database.
        ResourceError: if the spool or the database's folder can't be written.
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
    """Open a client that answers, or fails, in seconds: whoever calls retries by itself.

    Raises:
        TrackingError: if the server or database does not answer, a file is missing or no database, or the
            URI is not MLflow's.
    """
    # MLflow's defaults (7 retries, 120 s each) would hold a trial for minutes. A user's values win.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    # Progress bars and links of every trial would drown what a sweep prints.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    _checked(uri)
    with _errors(uri), warnings.catch_warnings():
        # MLflow 3.17 imports its models with a loader option that SQLAlchemy 2.1 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def find_run(client: MlflowClient, experiment_id: str, key: str) -> str | None:
    """Find the id of the run with this key, the oldest one if there are several."""
    return _oldest(client, experiment_id, f"tags.`{KEY_TAG}` = {_quoted(key)}")


def find_former(client: MlflowClient, experiment_id: str, former: Former, parent: str | None) -> str | None:
    """Find the id of the run that an earlier version made, the oldest one if there are several."""
    conditions = [f"tags.`{KEY_TAG}` = {_quoted(former.key)}"]
    if parent is not None:
        conditions.append(f"tags.`mlflow.parentRunId` = {_quoted(parent)}")
    conditions += [f"params.`{name}` = {_quoted(value)}" for name, value in former.params.items()]
    return _oldest(client, experiment_id, " and ".join(conditions))


def find_trained(client: MlflowClient, experiment_id: str, content_hash: str) -> str | None:
    """Find the id of the run that trained the adapter with this content, the oldest if there are several."""
    return _oldest(client, experiment_id, f"params.{HASH_PARAM} = '{content_hash}'")


def _quoted(text: str) -> str:
    # MLflow's filters know no escape, but two kinds of quotes.
    return f'"{text}"' if "'" in text else f"'{text}'"


def _oldest(client: MlflowClient, experiment_id: str, condition: str) -> str | None:
    found = client.search_runs(
        [experiment_id], condition, max_results=1, order_by=["attributes.start_time ASC"]
    )
    return str(found[0].info.run_id) if found else None


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_SECONDS_TO_ANSWER)}
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _migrate(file: Path) -> None:
    """Bring a database that an older MLflow made up to date, keeping a copy of it."""
    from mlflow.store.db.utils import _get_latest_schema_revision, _upgrade_db, create_sqlalchemy_engine

    if not file.is_file():
        return
    with contextlib.closing(sqlite3.connect(file)) as database:
        try:
            made_by = database.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.DatabaseError:
            made_by = None
    if made_by is None or made_by[0] == _get_latest_schema_revision():
        return
    # SQLite migrations are not transactional: one that fails half-way leaves no usable file.
    shutil.copyfile(file, file.with_name(f"{file.name}.before-migration"))
    engine = create_sqlalchemy_engine(f"sqlite:///{file}")
    try:
        _upgrade_db(engine)
    finally:
        engine.dispose()


def experiment_id(client: MlflowClient, name: str, location: str | None = None) -> str:
    """Find or create an experiment; a new one keeps its files at `location`.

    Raises:
        TrackingError: if it was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, location))
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
    """Fail fast where MLflow would retry a file, a server or a database for minutes."""
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
            socket.create_connection(place, timeout=_SECONDS_TO_ANSWER).close()
            engine = create_sqlalchemy_engine(uri)
            engine.connect().close()
            engine.dispose()


def _open_file(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} {'is a folder, not a file' if file.is_dir() else 'is not there'}")
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        try:
            database.execute("PRAGMA schema_version").fetchone()
        except sqlite3.OperationalError as error:
            # A writer may hold it for a moment, and MLflow waits for that.
            if "locked" not in str(error):
                raise


def _wait_for_answer(url: str) -> None:
    """Return after any answer or refusal, which MLflow's client tells more of; only silence is an error."""
    try:
        with contextlib.suppress(httpx.NetworkError, httpx.ProtocolError, httpx.UnsupportedProtocol):
            httpx.get(url, timeout=_SECONDS_TO_ANSWER)
    except httpx.TimeoutException as error:
        raise TimeoutError(f"no answer within {_SECONDS_TO_ANSWER} seconds") from error
    except httpx.InvalidURL as error:
        raise ValueError(f"no URL: {error}") from error


@contextlib.contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Turn whatever MLflow and its drivers raise into ours."""
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
    """Return the folder of the sqlite file that a URI names; None where it names a server."""
    file = _sqlite(uri)
    return None if file is None else file.parent


def away(uri: str, error: Exception) -> RayftError:
    """Make the error of an MLflow that is away or refuses, with the remedy; or of its full disk here."""
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

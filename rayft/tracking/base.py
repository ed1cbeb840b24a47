"""The contract of a tracker, and the picklable spec that a worker builds its tracker from.

A sweep is a parent run in MLflow, and each trial a child run. The caller identifies a run by a key. A resumed
sweep finds its runs again by their keys, so it creates no second ones.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from rayft.config import Section
from rayft.errors import TrackingError
from rayft.paths import PathText, check_text, read_path

__all__ = [
    "HASH_PARAM",
    "PENDING",
    "Former",
    "RunStatus",
    "Tracker",
    "TrackerSpec",
    "TrackingConfig",
    "check_uri",
    "redacted",
    "same_number",
    "tracker_spec",
]

RunStatus = Literal["finished", "stopped", "interrupted", "failed"]
"""How a run ended. Before its last step, the scheduler stops a run, and a person interrupts it."""

HASH_PARAM = "adapter_hash"
"""Parameter of a trial's run: the content hash of the adapter that it trained."""

PENDING = "key:"
"""Prefix of the id of a run that the server does not have yet. The key of the run follows it."""

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SERVERS = ("http", "https", "databricks")


class TrackingConfig(Section):
    """Where runs are tracked."""

    uri: PathText | None = None
    """An MLflow URI. By default MLFLOW_TRACKING_URI, or else a sqlite file in the output folder."""

    experiment: str = "rayft"
    """Name of the MLflow experiment."""


@dataclass(frozen=True)
class TrackerSpec:
    """What a worker needs to build a tracker. It can be pickled."""

    uri: str
    """MLflow tracking URI. The path of a sqlite file is absolute."""
    experiment: str
    """Name of the experiment."""
    spool: Path
    """Folder of the write-ahead files; each sweep has one."""
    experiment_id: str = ""
    """Set by `rayft.tracking.connection.prepare`."""


@dataclass(frozen=True)
class Former:
    """How to find a run that rayft 0.1.0 made, whose key did not depend on the data and the base.

    The run must have this key and these parameters, and be a child of the parent that the caller names.
    """

    key: str
    params: Mapping[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """Writes runs. No call waits for the server and no data is lost, even while the server is away."""

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

        Args:
            name: the name that MLflow shows.
            key: the identity of the run, unique in the experiment.
            parent: id of the run that this one is a child of.
            tags: set on the run, whether it is new or found again.
            former: how to find the run if no run has the key. A run that is found so gets the key.
            restart: whether to set a run that is found again to running, since more will be recorded.
        """
        ...

    def params(self, run_id: str, values: Mapping[str, str]) -> None:
        """Record settings. A value that is too long for the server is cut and ends in a note that says so.

        The first value of a setting stays. A later value that differs becomes the tag `changed.<name>`.
        """
        ...

    def metrics(self, run_id: str, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers at a step, or of the whole run if `step` is None. NaN and infinities are allowed.

        A metric has one value at a step, and the first one stays. Values that are recorded again, because
        steps are trained again or a command is run again, are left out.

        Numbers of the whole run are kept at step 0, where MLflow compares them as bars. A number that equals
        the last one is left out. A number that differs was measured anew: it is added, and MLflow shows it
        in place of the earlier one.
        """
        ...

    def artifact(self, run_id: str, path: str | Path, folder: str = "") -> None:
        """Store a file, or the files of a folder, below `folder` of the run.

        The files must stay unchanged until they are sent.

        Raises:
            TrackingError: if there is no such file or folder.
        """
        ...

    def finish(self, run_id: str, status: RunStatus = "finished", *, if_running: bool = False) -> None:
        """Record how and when the run ended. If it had ended with the same status before, that time stays.

        Args:
            run_id: the run.
            status: how it ended.
            if_running: whether to leave a run unchanged that has ended already, with any status.
        """
        ...


def tracker_spec(config: TrackingConfig, folder: str | Path) -> TrackerSpec:
    """Return where to track: at the configured URI, at MLFLOW_TRACKING_URI, or in `folder`/mlflow.db.

    Args:
        config: the tracking section.
        folder: output folder of the sweep. It holds the spool and, by default, the database.

    Raises:
        TrackingError: if the URI is a plain folder or of an unknown kind.
    """
    folder = Path(folder).absolute()
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
    return TrackerSpec(uri=check_uri(uri), experiment=config.experiment, spool=folder / "spool")


def check_uri(uri: str) -> str:
    """Return a tracking URI that MLflow accepts. The path of a sqlite file is made absolute.

    Raises:
        TrackingError: if the URI is a plain folder, names no file, or is of an unknown kind.
    """
    try:
        check_text(uri)
    except ValueError as error:
        raise TrackingError(f"the tracking URI {error} (tracking.uri or MLFLOW_TRACKING_URI)") from error
    # `databricks` alone is MLflow's name of the workspace that the environment names.
    scheme = uri.split(":", 1)[0].split("+", maxsplit=1)[0] if ":" in uri or uri == "databricks" else ""
    if scheme in ("", "file"):
        raise TrackingError(
            f"the tracking URI '{uri}' is a folder, which MLflow no longer writes to; use "
            f"sqlite:///{uri.removeprefix('file:').rstrip('/') or '.'}/mlflow.db, or move old runs with "
            "`mlflow migrate-filestore`"
        )
    if scheme not in (*_DATABASES, *_SERVERS):
        known = ", ".join((*_DATABASES, *_SERVERS))
        raise TrackingError(f"the tracking URI '{redacted(uri)}' is of no known kind; use one of {known}")
    if scheme == "sqlite":
        # Workers have other working directories, where a relative path would name another file.
        prefix, _, path = uri.partition(":///")
        if not path.strip():
            raise TrackingError(
                f"the tracking URI '{uri}' names no file; write sqlite:///mlflow.db, or "
                "sqlite:////folder/mlflow.db for an absolute path"
            )
        return f"{prefix}:///{read_path(path, 'tracking.uri, MLFLOW_TRACKING_URI or registry').absolute()}"
    return uri


def same_number(one: float, other: float) -> bool:
    """Return whether two metric values are equal on a server, which stores infinity as the largest float."""
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    largest = sys.float_info.max
    return max(-largest, min(one, largest)) == max(-largest, min(other, largest))


def redacted(uri: str) -> str:
    """Return a URI with its password replaced by `***`, for messages."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)

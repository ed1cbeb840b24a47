"""The contract of a tracker, and the picklable spec that workers build theirs from.

A sweep is a parent run, a trial a child run. Runs are found again by a key of the caller's, so a
resumed sweep makes no second run.
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
"""How a run ended; `stopped` is by the scheduler, `interrupted` by a person, before its last step."""

PENDING = "key:"
"""Prefix of the id of a run that the server does not have yet; the run's key follows."""

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SERVERS = ("http", "https", "databricks")


class TrackingConfig(Section):
    """Where runs are tracked."""

    uri: PathText | None = None
    """An MLflow URI; else MLFLOW_TRACKING_URI, else a sqlite file in the output folder."""

    experiment: str = "rayft"
    """Name of the MLflow experiment."""


@dataclass(frozen=True)
class TrackerSpec:
    """What a worker needs to build a tracker; picklable."""

    uri: str
    """MLflow tracking URI, absolute where it is a sqlite file."""
    experiment: str
    """Name of the experiment."""
    spool: Path
    """Folder of the write-ahead files, one for a sweep."""
    experiment_id: str = ""
    """Filled by `rayft.tracking.mlflow.prepare`."""


@dataclass(frozen=True)
class Former:
    """How a run is found that rayft 0.1.0 made: by a key that said nothing of data and base.

    It is taken only if it is a child of the parent that is asked for, and has the parameters.
    """

    key: str
    params: Mapping[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """Writes runs. Calls return at once, also while the server is away; none of them loses data."""

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
            name: what people see.
            key: identity, unique in the experiment.
            parent: id of the run that this one is a child of.
            tags: set on the run, whether it is new or found again.
            former: how to find it where no run has the key; what is found gets the key.
            restart: set a run that is found again running, since more will be recorded.
        """
        ...

    def params(self, run_id: str, values: Mapping[str, str]) -> None:
        """Record settings; values too long for the server are cut and say so.

        The first value of a setting stays. A later one that differs becomes the tag `changed.<name>`.
        """
        ...

    def metrics(self, run_id: str, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers at a step, or of the whole run (NaN and infinities allowed).

        A metric has one value at a step. The first one stays: what is recorded again, because steps are
        trained again or a command is run again, is left out.

        Numbers of the whole run are kept at step 0, where MLflow compares them as bars. One that differs from
        the last one was measured anew: it is recorded beside that and is shown in its place. An equal one is
        left out.
        """
        ...

    def artifact(self, run_id: str, path: str | Path, folder: str = "") -> None:
        """Store a file, or what a folder holds, below `folder` of the run.

        The path must stay as it is until the run's data is sent.

        Raises:
            TrackingError: if nothing is there.
        """
        ...

    def finish(self, run_id: str, status: RunStatus = "finished", *, if_running: bool = False) -> None:
        """Record how the run ended, and when.

        A run that has ended like this keeps its time.

        Args:
            run_id: the run.
            status: how it ended.
            if_running: leave a run alone that has ended already, in whatever way.
        """
        ...


def tracker_spec(config: TrackingConfig, folder: str | Path) -> TrackerSpec:
    """Decide where to track: the config's URI, MLFLOW_TRACKING_URI, or `folder`/mlflow.db.

    Args:
        config: the tracking section.
        folder: output folder of the sweep; the spool lies in it, and the database by default.

    Raises:
        TrackingError: if the URI is a plain folder or of an unknown kind.
    """
    folder = Path(folder).absolute()
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
    return TrackerSpec(uri=check_uri(uri), experiment=config.experiment, spool=folder / "spool")


def check_uri(uri: str) -> str:
    """Return a URI that MLflow can track at, with an absolute path where it is a sqlite file's.

    Raises:
        TrackingError: if it is a plain folder, names no file, or is of an unknown kind.
    """
    try:
        check_text(uri)
    except ValueError as error:
        raise TrackingError(f"the tracking URI {error} (tracking.uri or MLFLOW_TRACKING_URI)") from error
    scheme = uri.split(":", 1)[0].split("+", maxsplit=1)[0] if ":" in uri else ""
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
        # Workers have other working directories, so a relative file would be another one there.
        prefix, _, path = uri.partition(":///")
        if not path.strip():
            raise TrackingError(
                f"the tracking URI '{uri}' names no file; write sqlite:///mlflow.db, or "
                "sqlite:////folder/mlflow.db for an absolute path"
            )
        return f"{prefix}:///{read_path(path, 'tracking.uri, MLFLOW_TRACKING_URI or registry').absolute()}"
    return uri


def same_number(one: float, other: float) -> bool:
    """Return whether two metric values are the same on a server, where infinity is the largest number."""
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    largest = sys.float_info.max
    return max(-largest, min(one, largest)) == max(-largest, min(other, largest))


def redacted(uri: str) -> str:
    """Hide the password of a URI, for messages."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)

"""Reading a run back: its settings, and the adapter that it stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException

from rayft.errors import TrackingError
from rayft.files import room_on
from rayft.tracking.base import redacted
from rayft.tracking.connection import away, connect

__all__ = ["StoredRun", "read_run"]


@dataclass(frozen=True)
class StoredRun:
    """What a tracking server has of a run."""

    name: str
    params: Mapping[str, str]
    adapter: Path | None
    """The folder that its adapter was downloaded to; None if it stored none."""


def read_run(uri: str, run_id: str, folder: Path) -> StoredRun:
    """Fetch a run, its adapter into `folder`.

    Raises:
        TrackingError: if the server is away or has no such run.
    """
    client = connect(uri)
    try:
        run = client.get_run(run_id)
        stored = {item.path for item in client.list_artifacts(run_id)}
        with room_on(Path(folder)):
            adapter = (
                Path(client.download_artifacts(run_id, "adapter", str(folder)))
                if "adapter" in stored
                else None
            )
    except (MlflowException, OSError) as error:
        if getattr(error, "error_code", "") in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"):
            raise away(uri, error) from error
        raise TrackingError(
            f"no run {run_id} can be read at {redacted(uri)} ({error}); give the id of a trial's run, and "
            "with --uri the tracking server that has it"
        ) from error
    return StoredRun(str(run.info.run_name or run_id), dict(run.data.params), adapter)

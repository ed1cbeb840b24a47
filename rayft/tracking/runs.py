"""Runs on an MLflow server: finding them again by what identifies them, and reading them back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rayft.errors import TrackingError
from rayft.files import room_on
from rayft.tracking.base import HASH_PARAM, Former, redacted
from rayft.tracking.connection import away, connect

__all__ = ["KEY_TAG", "StoredRun", "find_former", "find_run", "find_trained", "quoted", "read_run"]

KEY_TAG = "rayft.key"
"""Tag that holds the key of a run, by which the run is found again."""


def find_run(client: MlflowClient, experiment_id: str, key: str) -> str | None:
    """Return the id of the run with this key, the oldest one if there are several, None if there is none."""
    return _oldest(client, experiment_id, f"tags.`{KEY_TAG}` = {quoted(key)}")


def find_former(client: MlflowClient, experiment_id: str, former: Former, parent: str | None) -> str | None:
    """Return the id of the run that rayft 0.1.0 made, the oldest one if there are several.

    Args:
        client: of the server.
        experiment_id: the experiment to search.
        former: the key and parameters that the run must have.
        parent: id of the run that it must be a child of; None allows any.
    """
    conditions = [f"tags.`{KEY_TAG}` = {quoted(former.key)}"]
    if parent is not None:
        conditions.append(f"tags.`mlflow.parentRunId` = {quoted(parent)}")
    conditions += [f"params.`{name}` = {quoted(value)}" for name, value in former.params.items()]
    return _oldest(client, experiment_id, " and ".join(conditions))


def find_trained(client: MlflowClient, experiment_id: str, content_hash: str) -> str | None:
    """Return the id of the run that trained this adapter, the oldest one if there are several."""
    return _oldest(client, experiment_id, f"params.{HASH_PARAM} = '{content_hash}'")


@dataclass(frozen=True)
class StoredRun:
    """What a tracking server has of a run."""

    name: str
    params: Mapping[str, str]
    adapter: Path | None
    """The folder that its adapter was downloaded to; None if the run stored none."""


def read_run(uri: str, run_id: str, folder: Path) -> StoredRun:
    """Read a run from a server, and download its adapter into `folder`.

    Raises:
        TrackingError: if the server is away or has no such run.
        DiskFullError: if there is no space for the adapter.
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
            f"no run {run_id} can be read at {redacted(uri)} ({error}); pass the id of a trial's run, and "
            "with --uri the tracking server that has it"
        ) from error
    return StoredRun(str(run.info.run_name or run_id), dict(run.data.params), adapter)


def quoted(text: str) -> str:
    """Return a text as a value in a filter of MLflow's."""
    # MLflow's filters have no escape character, but accept either kind of quotes.
    return f'"{text}"' if "'" in text else f"'{text}'"


def _oldest(client: MlflowClient, experiment_id: str, condition: str) -> str | None:
    found = client.search_runs(
        [experiment_id], condition, max_results=1, order_by=["attributes.start_time ASC"]
    )
    return str(found[0].info.run_id) if found else None

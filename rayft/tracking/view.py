"""How MLflow's UI shows a sweep: as a table of the runs below it, the best first, which a link opens.

A view of the UI is kept as a tag of its experiment, as the UI itself keeps a view that a user saves. A
release of MLflow that does not know this form shows its own default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag

__all__ = ["EXPERIMENT_TAGS", "VIEW_TAG", "dataset_inputs", "place", "view"]

EXPERIMENT_TAGS = {
    "mlflow.note.content": "Sweeps of rayft. Switch to “Model training” at the upper left, and choose a "
    "sweep at the upper right of its runs."
}
"""Of a new experiment. The UI shows the note in the list of experiments; it opens an experiment as one of
traces of agents, whatever its tags say, unless a link asks for model training."""
VIEW_TAG = "mlflow.sharedViewState."
"""Beginning of the tags that hold views; the rest is the key of the view."""

_COLUMNS = (
    "metrics.`test_score`",
    "metrics.`val_score`",
    "metrics.`best_val_loss`",
    "params.`method.name`",
    "params.`method.rank`",
    "params.`optim.lr`",
    "metrics.`train_seconds`",
    "metrics.`trainable_parameters`",
    "metrics.`adapter_bytes`",
    "attributes.`Dataset`",
)
_CONTEXTS = {"train": "training", "val": "validation", "test": "test"}
"""Part of the data → MLflow's word for its use."""


def view(run_id: str, name: str, time: int) -> str:
    """Return the view of the runs below a run, as the value of its tag.

    Args:
        run_id: of the run above.
        name: under which the UI lists the view.
        time: when it was made, in milliseconds since 1970.
    """
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": _COLUMNS[0],
        "orderByAsc": False,
        "selectedColumns": _COLUMNS,
        "columnOrder": _COLUMNS,
        "runsHiddenMode": "FIRST_20_RUNS",
    }
    return json.dumps({"name": name, "createdAt": time, "updatedAt": time, "state": json.dumps(state)})


def place(experiment_id: str, run_id: str) -> str:
    """Return where the UI shows the view of a run, to be put behind the address of the server."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={run_id}&workflowType=machine_learning"


def dataset_inputs(record: Mapping[str, Any]) -> list[DatasetInput]:
    """Return the parts of a data set in MLflow's form.

    Args:
        record: `name`, `source`, and `parts`: part → its digest and number of examples.
    """
    found = []
    for part, (digest, count) in record["parts"].items():
        data = Dataset(
            name=record["name"],
            digest=digest,
            source_type=record["source"],
            source=json.dumps({"name": record["name"]}),
            profile=json.dumps({"num_rows": count}),
        )
        found.append(DatasetInput(data, [InputTag("mlflow.data.context", _CONTEXTS[part])]))
    return found

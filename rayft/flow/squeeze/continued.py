"""Train squeezed adapters further at their lower rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from rayft.artifacts import AdapterArtifact, folder_bytes
from rayft.errors import ArtifactError, TrainError
from rayft.flow.squeeze.make import SqueezedAdapter, sort_columns
from rayft.methods.base import MethodConfig
from rayft.squeeze.section import ContinueConfig
from rayft.sweep.broker import Event, Job
from rayft.sweep.executor import Executor
from rayft.sweep.lane import TrainRequest
from rayft.sweep.result import RESULT_FILE, damage, discard, read_result, result_identity
from rayft.tracking.base import TrackerSpec
from rayft.train.checkpoint import checkpoint_identity
from rayft.train.context import trial_folder
from rayft.train.run import RunConfig

__all__ = ["continue_all", "continued_run"]


def continue_all(
    executor: Executor,
    items: Sequence[SqueezedAdapter],
    cont: ContinueConfig,
    output: Path,
    tracker: TrackerSpec | None = None,
    say: Callable[[str], None] | None = None,
) -> list[SqueezedAdapter]:
    """Train squeezed adapters further at their lower rank, one in each lane at a time.

    An adapter that an interrupted command has already trained further is not trained again, unless it was
    trained from something else.

    Args:
        executor: of the lanes.
        items: the squeezed adapters.
        cont: how to train them.
        output: folder for the runs.
        tracker: where the runs are tracked.
        say: called with a sentence for each adapter that fails, which is then left out.

    Returns:
        The resulting adapters, in the order of `items`.

    Raises:
        TrainError, ArtifactError: if an adapter fails and `say` is not given.
    """
    wanted = [_continuation(item, cont, output, tracker) for item in items]
    known = {request.key: _finished(request, say) for _, request in wanted}
    jobs = [Job.of(request.key, "train", request) for _, request in wanted if known[request.key] is None]
    executor.submit(jobs)
    made = []
    for new, request in wanted:
        try:
            values = known[request.key] or _wait(executor, request.key)
            made.append(_continued(new, values, cont))
        except (TrainError, ArtifactError) as error:
            if say is None:
                raise
            say(f"{new.name} is left out: {error}")
    return made


def _continuation(
    item: SqueezedAdapter, cont: ContinueConfig, output: Path, tracker: TrackerSpec | None
) -> tuple[SqueezedAdapter, TrainRequest]:
    """Return the adapter that further training will make, and the request of the job that trains it."""
    new = replace(item, name=f"{item.name}+{cont.steps}", how="cont")
    request = TrainRequest(
        key=new.key,
        # The rank comes first because MLflow's table cuts off the end of a name.
        name=f"@{new.label} of {new.source.name}",
        run=continued_run(item, cont).model_dump_json(),
        output=str(output),
        evaluate_at=(),
        tracker=tracker,
        parent=new.source.run_id or None,
        expected=new.source.identity,
    )
    return new, request


def _finished(request: TrainRequest, say: Callable[[str], None] | None) -> dict[str, Any] | None:
    """Return the result that an earlier run has left for a request; None if it has to be trained.

    A damaged result, and one that was trained from something else, are deleted with their checkpoints.

    Raises:
        TrainError: if there is a checkpoint of rayft 0.1.0, whose data and base are not known.
    """
    folder = trial_folder(request.output, request.key)
    if problem := damage(folder):
        if say is not None:
            say(f"{request.name} is trained again: {problem}")
        discard(folder)
    values = read_result(request.output, request.key)
    if values is None:
        left = checkpoint_identity(folder / "checkpoint")
        if left is not None and not left.data:
            raise TrainError(
                f"{folder} holds a checkpoint of rayft 0.1.0, which did not record its data and base; delete "
                "it to train from the start"
            )
        return None
    run = RunConfig.model_validate_json(request.run)
    assert run.start is not None
    start = AdapterArtifact.load(run.start).content_hash
    now = request.identity.model_copy(update={"start": start, "start_name": run.start})
    if not result_identity(folder, values).differences(now):
        return values
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    (folder / RESULT_FILE).unlink()
    return None


def continued_run(item: SqueezedAdapter, cont: ContinueConfig) -> RunConfig:
    """Return the run that trains a squeezed adapter further.

    Args:
        item: the adapter.
        cont: how to train it. Without a learning rate, that of the source's run is used.

    Raises:
        ConfigError: if the settings don't fit the adapter.
    """
    run = item.source.run
    assert run is not None
    optim = run.optim.model_copy(
        update={
            "steps": cont.steps,
            "lr": cont.lr or run.optim.lr,
            "warmup": min(2, cont.steps) if cont.warmup is None else cont.warmup,
        }
    )
    sections: dict[str, Any] = {name: getattr(run, name) for name in RunConfig.model_fields}
    # Targets, ranks and scale follow from the factors of the adapter, so they are not set here.
    sections |= {
        "optim": optim,
        "method": MethodConfig(name="lora", rank=item.rank, dropout=run.method.dropout),
    }
    sections |= {"start": str(item.folder.absolute()), "anneal": None}
    return RunConfig(**sections)


def _wait(executor: Executor, key: str) -> Mapping[str, Any]:
    """Wait for the end of a training job, and return the values of its final event.

    Raises:
        TrainError: if it fails.
    """
    event: Event = ray.get(executor.broker.next_event.remote(key))
    while event.kind == "report":
        event = ray.get(executor.broker.next_event.remote(key))
    event.raise_fatal()
    if event.kind != "final":
        raise TrainError(f"{key} can't be trained further: {event.values.get('error', 'it was interrupted')}")
    return event.values


def _continued(item: SqueezedAdapter, values: Mapping[str, Any], cont: ContinueConfig) -> SqueezedAdapter:
    """Return an adapter that was trained further, as saved beside its start.

    Its columns are sorted by singular value again, so that it can be served at lower ranks too.
    """
    result = values["result"]
    folder = item.folder.with_name(item.label)
    full = sort_columns(result["folder"], folder, made=item.source.maker(item.label, cont))
    return replace(
        item,
        folder=folder,
        parameters=full.parameters,
        bytes=folder_bytes(folder),
        seconds=item.seconds + result["seconds"]["train"] + result["seconds"]["evaluate"],
        val_loss=float(result["val_loss"]),
    )

"""Train squeezed adapters further at their lower rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayft.artifacts import AdapterArtifact, folder_bytes
from rayft.errors import ArtifactError, TrainError
from rayft.flow.squeeze.make import SqueezedAdapter, sort_columns
from rayft.methods.base import MethodConfig
from rayft.squeeze.section import ContinueConfig
from rayft.sweep.executor import Executor
from rayft.sweep.jobs import Job, Outcome
from rayft.sweep.request import TrainRequest
from rayft.sweep.result import RESULT_FILE, TrialResult, damage, discard, read_result, trial_folder
from rayft.tracking.base import TrackerSpec
from rayft.train.checkpoint_folder import checkpoint_identity
from rayft.train.run import RunConfig
from rayft.train.trainer import TrainResult

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
    jobs = [Job.of(request.key, request) for _, request in wanted if known[request.key] is None]
    trained = dict(executor.run(jobs))
    made = []
    for new, request in wanted:
        try:
            left = known[request.key] or _result(request.key, trained[request.key])
            made.append(_continued(new, left.result, cont))
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
        run=continued_run(item, cont),
        output=str(output),
        evaluate_at=(),
        tracker=tracker,
        parent=new.source.run_id or None,
        expected=new.source.identity,
    )
    return new, request


def _finished(request: TrainRequest, say: Callable[[str], None] | None) -> TrialResult | None:
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
    earlier = read_result(request.output, request.key)
    if earlier is None:
        left = checkpoint_identity(folder / "checkpoint")
        if left is not None and not left.data:
            raise TrainError(
                f"{folder} holds a checkpoint of rayft 0.1.0, which did not record its data and base; delete "
                "it to train from the start"
            )
        return None
    assert request.run.start is not None
    start = AdapterArtifact.load(request.run.start).content_hash
    now = request.identity.model_copy(update={"start": start, "start_name": request.run.start})
    if not earlier.identity.differences(now):
        return earlier
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


def _result(key: str, trained: Outcome[TrialResult]) -> TrialResult:
    """Return the result of a training job.

    Raises:
        TrainError: if it failed.
    """
    if trained.result is None:
        raise TrainError(f"{key} can't be trained further: {trained.error}")
    return trained.result


def _continued(item: SqueezedAdapter, result: TrainResult, cont: ContinueConfig) -> SqueezedAdapter:
    """Return an adapter that was trained further, as saved beside its start.

    Its columns are sorted by singular value again, so that it can be served at lower ranks too.
    """
    folder = item.folder.with_name(item.label)
    full = sort_columns(result.folder, folder, made=item.source.maker(item.label, cont))
    return replace(
        item,
        folder=folder,
        parameters=full.parameters,
        bytes=folder_bytes(folder),
        seconds=item.seconds + result.seconds["train"] + result.seconds["evaluate"],
        val_loss=result.val_loss,
    )

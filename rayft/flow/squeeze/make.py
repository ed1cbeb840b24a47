"""Squeezing as a stage: bring adapters to lower ranks, train them on where asked to, score what came out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray

from rayft.artifacts import AdapterArtifact, folder_bytes
from rayft.config import content_hash
from rayft.errors import ArtifactError, TrainError
from rayft.flow.scores import ScoreStore
from rayft.flow.scoring import Measured, score_all
from rayft.identity import UNKNOWN, Identity
from rayft.methods.base import MethodConfig
from rayft.squeeze.budget import parse_bytes
from rayft.squeeze.rank import Progress, retained_energy, squeeze
from rayft.squeeze.section import ContinueConfig, SqueezeConfig
from rayft.sweep.broker import Event, Job
from rayft.sweep.executor import Executor
from rayft.sweep.lane import TrainRequest, tracking_key
from rayft.sweep.result import RESULT_FILE, damage, discard, read_result, result_identity
from rayft.sweep.score import ScoreRequest
from rayft.tracking.base import TrackerSpec
from rayft.train.checkpoint import checkpoint_identity
from rayft.train.context import trial_folder
from rayft.train.run import RunConfig

__all__ = [
    "Source",
    "SqueezedAdapter",
    "Target",
    "continue_all",
    "make",
    "score",
    "sort_columns",
    "targets",
]

Part = Literal["val", "test"]


@dataclass(frozen=True)
class Target:
    """How far to squeeze: a rank, a share of energy, or a size."""

    rank: int | None = None
    energy: float | None = None
    budget: str | None = None

    @property
    def label(self) -> str:
        """Its short name, also of its folder: `r8`, `e0.95`, `b1.5MB`."""
        if self.rank is not None:
            return f"r{self.rank}"
        return f"e{self.energy:g}" if self.energy is not None else f"b{str(self.budget).replace(' ', '')}"

    def apply(self, full: AdapterArtifact) -> AdapterArtifact:
        """View a squeezed adapter at this target.

        Raises:
            SqueezeError: if it can't be met.
        """
        budget = None if self.budget is None else parse_bytes(self.budget)
        return squeeze(full, rank=self.rank, energy=self.energy, budget=budget)


@dataclass(frozen=True)
class Source:
    """What is squeezed: a trial, or an adapter folder from elsewhere."""

    name: str
    key: str
    """Unique where its results are kept and tracked."""
    run: RunConfig | None
    """Its base and data, for scoring and further training."""
    run_id: str = ""
    """Its run in the tracker."""
    identity: Identity = UNKNOWN
    """Of that base and data; unknown where there is no `run`."""
    made_by: str = "sweep"
    """Command and source that its results are marked with."""

    def maker(self, label: str, cont: ContinueConfig | None = None) -> str:
        """Return the mark of a result: the command, what it read and what it made (`ArtifactMeta.made`)."""
        mark = f"{self.made_by} to {label}"
        if cont is None:
            return mark
        return f"{mark} by {content_hash(cont)} {content_hash(self.run) if self.run else ''}".rstrip()

    def makers(self, targets: Sequence[Target], cont: ContinueConfig | None) -> dict[str, str]:
        """Return the names of all folders that squeezing to some targets may write → their marks."""
        marks = {target.label: self.maker(target.label) for target in targets}
        if cont is not None:
            names = [f"{label}+{cont.steps}" for label in marks]
            marks |= {name: self.maker(name, cont) for name in names}
        return marks


@dataclass(frozen=True)
class SqueezedAdapter:
    """A lower rank of a source, made."""

    name: str
    source: Source
    how: Literal["post", "cont"]
    rank: int
    folder: Path
    parameters: int
    bytes: int
    energy: Mapping[str, float]
    """Module → share of the source's energy that the squeeze kept."""
    seconds: float
    val_loss: float | None = None

    @property
    def key(self) -> str:
        """Unique where results are kept."""
        return f"{self.source.key}@{self.label}"

    @property
    def tracked_as(self) -> str:
        """Its key in the tracker, where scores on other data are of another run."""
        return tracking_key(self.key, self.source.identity)

    @property
    def energy_mean(self) -> float:
        """Share of energy that was kept, mean over modules."""
        return sum(self.energy.values()) / len(self.energy)

    @property
    def energy_min(self) -> float:
        """The same of the module that keeps least."""
        return min(self.energy.values())

    @property
    def label(self) -> str:
        """What comes after the source's name."""
        return self.name.rpartition("@")[2]


def targets(config: SqueezeConfig, rank: int | None) -> list[Target]:
    """List what a configuration asks for of an adapter of a rank, ranks that are no lower left out.

    None stands for what has no factors, and so no rank that would be too low.
    """
    found = [Target(rank=target) for target in config.ranks if rank is None or target < rank]
    if config.energy is not None:
        found.append(Target(energy=config.energy))
    if config.budget is not None:
        found.append(Target(budget=config.budget))
    return found


def make(full: AdapterArtifact, target: Target, source: Source, folder: Path) -> SqueezedAdapter:
    """Write a squeezed adapter at a target to `folder`/<label>, marked with what made it.

    Raises:
        SqueezeError: if the target can't be met; nothing is written then.
        ArtifactError, ResourceError: as `AdapterArtifact.save`.
    """
    started = time.perf_counter()
    small = _marked(target.apply(full), source.maker(target.label))
    path = small.save(folder / target.label)
    return SqueezedAdapter(
        name=f"{source.name}@{target.label}",
        source=source,
        how="post",
        rank=small.rank,
        folder=path,
        parameters=small.parameters,
        bytes=folder_bytes(path),
        energy=retained_energy(small),
        seconds=time.perf_counter() - started,
    )


def continue_all(
    executor: Executor,
    items: Sequence[SqueezedAdapter],
    cont: ContinueConfig,
    output: Path,
    tracker: TrackerSpec | None = None,
    say: Callable[[str], None] | None = None,
) -> list[SqueezedAdapter]:
    """Train squeezed adapters on at their lower rank, as many at once as there are lanes.

    Args:
        executor: of the lanes.
        items: what to train on.
        cont: how.
        output: folder for the trainings.
        tracker: where they are tracked.
        say: called with a sentence for each that fails, which is left out then.

    Raises:
        TrainError: if one of them fails and `say` is not given.
    """
    wanted = [_continuation(item, cont, output, tracker) for item in items]
    # What an interrupted stage had finished is not trained again, if it follows from the same.
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
    """Return what a continued training will make, and the job that trains it."""
    new = replace(item, name=f"{item.name}+{cont.steps}", how="cont")
    request = TrainRequest(
        key=new.key,
        # The rank first: MLflow's table cuts off the end of a name.
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
    """Read the result of an earlier continued training; None if there is none that can be used again.

    What is damaged, or follows from something else, is trained again; a checkpoint that would not fit is
    dropped.
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
                "it to start again"
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
    """Give the run that trains a squeezed adapter on.

    Raises:
        ConfigError: if its settings don't fit the adapter.
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
    # What the factors say (targets, ranks, scale) is not said again.
    sections |= {
        "optim": optim,
        "method": MethodConfig(name="lora", rank=item.rank, dropout=run.method.dropout),
    }
    sections |= {"start": str(item.folder.absolute()), "anneal": None}
    return RunConfig(**sections)


def score(
    executor: Executor,
    items: Sequence[SqueezedAdapter],
    parts: tuple[Part, ...] = ("val", "test"),
    store: ScoreStore | None = None,
) -> dict[str, Measured]:
    """Score squeezed adapters as they lie on disk; what can't be scored says why in its `error`."""
    requests = {}
    for item in items:
        assert item.source.run is not None
        requests[item.name] = ScoreRequest(
            run=item.source.run.model_dump_json(),
            parts=parts,
            adapter=str(item.folder),
            expected=item.source.identity,
        )
    return score_all(executor, requests, store)


def sort_columns(
    folder: str | Path, out: Path, progress: Progress | None = None, *, made: str = "sweep"
) -> AdapterArtifact:
    """Write an adapter with its columns sorted by singular value (at its full rank), and return it."""
    full = _marked(squeeze(AdapterArtifact.load(folder), progress=progress), made)
    full.save(out)
    return full


def _wait(executor: Executor, key: str) -> Mapping[str, Any]:
    """Wait for a training to end."""
    event: Event = ray.get(executor.broker.next_event.remote(key))
    while event.kind == "report":
        event = ray.get(executor.broker.next_event.remote(key))
    event.raise_fatal()
    if event.kind != "final":
        raise TrainError(f"{key} can't be trained on: {event.values.get('error', 'it was interrupted')}")
    return event.values


def _marked(artifact: AdapterArtifact, made: str) -> AdapterArtifact:
    return replace(artifact, meta=artifact.meta.model_copy(update={"made": made}))


def _continued(item: SqueezedAdapter, values: Mapping[str, Any], cont: ContinueConfig) -> SqueezedAdapter:
    """Take what a continued training left; its columns are sorted again, so that it has prefixes too."""
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

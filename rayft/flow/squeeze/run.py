"""`rayft squeeze`: bring any adapter folder to lower ranks, and score and train the results if asked to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from rayft.artifacts import AdapterArtifact, folder_bytes
from rayft.errors import SqueezeError
from rayft.flow.cluster import cluster, has_gpus, join
from rayft.flow.config import load_train_config
from rayft.flow.display import Display
from rayft.flow.hold import hold
from rayft.flow.lanes import use_lanes
from rayft.flow.options import refuse_unused
from rayft.flow.origin import Origin, find_origin
from rayft.flow.scoring import Measured, check_some, say_unscored, score_squeezed
from rayft.flow.selection import keeps, smallest_good
from rayft.flow.squeeze.checks import check_base, check_places
from rayft.flow.squeeze.continued import continue_all
from rayft.flow.squeeze.dense import Dense, dense_source, extract, files_digest, lost_text
from rayft.flow.squeeze.make import Source, SqueezedAdapter, make
from rayft.flow.squeeze.request import SqueezeRequest, check_request, wanted_targets
from rayft.flow.squeeze.tracking import track_squeezed
from rayft.flow.sweep.identity import current_identity, recorded_sweep
from rayft.flow.target import at_rank
from rayft.identity import UNKNOWN
from rayft.models.base import pinned
from rayft.models.load import ModelConfig
from rayft.registry.ref import AdapterRef
from rayft.report.text import human_bytes, human_count, score_text
from rayft.squeeze.rank import Progress, squeeze
from rayft.sweep.executor import EXECUTORS, Executor
from rayft.sweep.space import check_executor
from rayft.tracking.base import TrackerSpec
from rayft.tracking.mlflow import MlflowTracker, flush_spool
from rayft.train.run import RunConfig

__all__ = ["Squeezes", "measure", "squeeze_folder", "squeeze_table"]

WORK = ".work"
"""Folder in the output for what is not a result: workers' logs, checkpoints, plots."""


@dataclass
class Squeezes:
    """What a command has squeezed."""

    source: Source
    folder: Path
    """Folder of the source, at the rank at which squeezing started."""
    bytes: int
    """Size of the source."""
    rank: int
    """Rank of the source, or of the LoRA that was extracted from it."""
    parameters: int
    """Parameters of the source, or of that LoRA."""
    made: list[SqueezedAdapter] = field(default_factory=list)
    scores: dict[str, Measured] = field(default_factory=dict)
    """Name of the source or of a result → its scores; empty if nothing was scored."""
    chosen: SqueezedAdapter | None = None
    """The smallest result that keeps the score, if that was asked for."""
    note: str = ""
    """What the user has to know about the results."""


def squeeze_folder(request: SqueezeRequest, console: Console) -> Squeezes:
    """Squeeze a folder to all targets. Mistakes are found before the first result is written.

    Raises:
        SqueezeError, ArtifactError, BaseMismatchError, ConfigError: naming what is wrong and what to do.
            The source stays as it is.
    """
    check_request(request)
    with hold(request.out.absolute(), "--out"):
        return _squeeze_held(request, console)


def _squeeze_held(request: SqueezeRequest, console: Console) -> Squeezes:
    """Squeeze into an output folder that this command holds."""
    dense = dense_source(request.source)
    if dense is not None and request.place.rank is None:
        return _squeeze_dense(request, dense, console)
    artifact = at_rank(request.place)
    origin = _origin(request, artifact)
    run = _run(request, origin, artifact)
    unchecked = check_base(artifact, request.base, run)
    wanted = wanted_targets(request, artifact.rank)
    measured = run is not None and (request.keep_score is not None or request.cont is not None)
    identity = current_identity(run, origin.sweep) if run is not None and measured else UNKNOWN
    identity = identity.model_copy(update={"sweep": recorded_sweep(origin.sweep)})
    source = Source(
        origin.name,
        f"{origin.name}-{artifact.content_hash}",
        run,
        origin.run_id,
        identity,
        made_by=f"squeeze {artifact.content_hash}",
    )
    parent = artifact.meta.parent if artifact.squeezed else artifact.content_hash
    check_places(request.source, request.out, source.makers(wanted, request.cont), parent, request.overwrite)
    with _bar(console, len(artifact.modules)) as progress:
        full = squeeze(artifact, device=request.device, progress=progress)
    for target in wanted:
        target.apply(full)
    note = "\n".join(filter(None, (origin.note, unchecked)))
    searching = not request.targets
    with tempfile.TemporaryDirectory() as scratch:
        # What a search tries and does not choose is not a result.
        folder = Path(scratch) if searching else request.out
        whole = request.place.rank is None
        start = request.source if whole else artifact.save(Path(scratch) / "source")
        found = Squeezes(source, start, folder_bytes(start), artifact.rank, artifact.parameters, note=note)
        found.made = [make(full, target, source, folder) for target in wanted]
        if run is not None and measured:
            _with_lanes(request, run, origin, found, Display(console), folder)
        if searching:
            _keep_chosen(request, found)
    _track(request, origin, found)
    return found


def _squeeze_dense(request: SqueezeRequest, dense: Dense, console: Console) -> Squeezes:
    """Extract a LoRA from a source without factors, and squeeze it to all targets."""
    if request.keep_score is not None or request.cont is not None:
        raise SqueezeError(
            f"{request.source} has no factors: extract a LoRA first (--rank 64), then squeeze that by its "
            "score, or train it further"
        )
    if request.base is not None:
        why = f"of a source without factors only its base is read, which --base {request.base} names"
        refuse_unused({"--config": request.config}, why)
    config = load_train_config(request.config).model if request.config else None
    base = ModelConfig(name=request.base) if request.base else config
    name = request.source.resolve().name
    made_by = f"squeeze {files_digest(request.source)}"
    places = Source(name, name, None, made_by=made_by).makers(request.targets, None)
    check_places(request.source, request.out, places, "", request.overwrite)
    with _bar(console, None) as progress:
        extraction = extract(dense, base, request.targets, request.device, progress)
    full = extraction.artifact
    for target in request.targets:
        target.apply(full)
    source = Source(name, f"{name}-{full.content_hash}", None, made_by=made_by)
    size = sum(file.stat().st_size for file in request.source.glob("*.safetensors"))
    found = Squeezes(source, request.source, size, full.rank, full.parameters, note=lost_text(extraction))
    found.made = [make(full, target, source, request.out) for target in request.targets]
    return found


def _origin(request: SqueezeRequest, artifact: AdapterArtifact) -> Origin:
    """Return where the source comes from, under the name that its results are shown by."""
    place = request.place
    origin = find_origin(place.folder, artifact, request.config)
    name = AdapterRef.parse(place.name).name if place.registered else origin.name
    return replace(origin, name=name if place.rank is None else f"{name}@r{place.rank}")


def _run(request: SqueezeRequest, origin: Origin, artifact: AdapterArtifact) -> RunConfig | None:
    """Return a run with the base, the data and the source's learning rate; None if they are unknown."""
    if origin.config is None:
        if request.keep_score is not None or request.cont is not None:
            raise SqueezeError(
                "scoring and further training need the base and the data: give a configuration that names "
                "them with --config, or a folder below a sweep's output"
            )
        return None
    if origin.note and request.cont is not None and request.cont.lr is None:
        raise SqueezeError(f"{origin.note}. Give the learning rate of further training with --lr")
    join()
    run = origin.config.run(has_gpus())
    optim = run.optim.model_copy(update={"lr": origin.lr or run.optim.lr})
    return run.model_copy(update={"optim": optim, "model": pinned(run.model, artifact)})


@contextmanager
def _bar(console: Console, modules: int | None) -> Iterator[Progress]:
    """Show a progress bar of modules, and yield the function that advances it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Where nothing is redrawn, an empty line would be all that it prints.
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("modules", total=modules)
        yield lambda done: bar.advance(task, done)


def _with_lanes(
    request: SqueezeRequest, run: RunConfig, origin: Origin, found: Squeezes, display: Display, folder: Path
) -> None:
    """Train further and score in a lane, as a sweep does."""
    assert origin.config is not None
    how = origin.config.execution
    kind = check_executor(how, run)
    with cluster(run.scale.workers, device=run.scale.device, gpu_share=run.scale.gpu_share):
        executor = EXECUTORS[kind](
            run.scale, str(folder.absolute() / WORK / "ray"), 1, how.restarts, "squeeze"
        )
        with use_lanes(executor, display):
            with display.stage("start a worker"):
                executor.start()
            with display.stage("train further and score"), display.watch(executor.broker):
                measure(request, executor, found, folder.absolute() / WORK, origin.tracker, display)


def measure(
    request: SqueezeRequest,
    executor: Executor,
    found: Squeezes,
    folder: Path,
    tracker: TrackerSpec | None,
    display: Display,
) -> None:
    """Train the squeezed adapters further if asked to, score them and their source, and choose if asked to.

    An adapter that can't be scored is reported and its folder stays; the others are scored.

    Args:
        request: what was asked for.
        executor: of the lanes.
        found: what has been squeezed; adapters that were trained further, scores and the choice are added.
        folder: for the runs of further training.
        tracker: where those runs are tracked.
        display: reports what can't be scored.

    Raises:
        TrainError: if the source can't be scored, or none of the squeezed adapters can.
    """
    if request.cont is not None:
        found.made += continue_all(executor, found.made, request.cont, folder, tracker)
    source = _as_item(found)
    found.scores = score_squeezed(executor, [source], ("val",))
    check_some(found.scores)
    reached = found.scores[source.name].mean("val") or 0.0
    keep = request.keep_score
    for item in sorted(found.made, key=lambda item: -item.parameters):
        found.scores |= score_squeezed(executor, [item], ("val",))
        if found.scores[item.name].error:
            continue
        lost = keep is not None and not keeps(found.scores[item.name].mean("val") or 0.0, reached, keep)
        if lost and not request.targets and request.cont is None:
            break  # Lower ranks lose more.
    check_some({item.name: found.scores[item.name] for item in found.made if item.name in found.scores})
    scored = [item for item in found.made if item.name in found.scores and not found.scores[item.name].error]
    if keep is not None:
        found.chosen = smallest_good(scored, found.scores, reached, keep)
    # The test part is read only for what is reported: the source, and what was asked for or chosen.
    reported = scored if request.targets else [found.chosen] if found.chosen else []
    for name, measured in score_squeezed(executor, [source, *reported], ("test",)).items():
        found.scores[name] = Measured({**found.scores[name].parts, **measured.parts}, measured.error)
    check_some({source.name: found.scores[source.name]})
    say_unscored(found.scores, display.say)


def _keep_chosen(request: SqueezeRequest, found: Squeezes) -> None:
    """Save the result that a search chose in the output folder, and drop the others.

    Raises:
        SqueezeError: if no result keeps the score, with the scores that were reached.
    """
    if found.chosen is None:
        reached = found.scores[found.source.name].mean("val") or 0.0
        tried = {
            item.label: found.scores[item.name].mean("val")
            for item in found.made
            if item.name in found.scores
        }
        shown = ", ".join(f"{label} {value:.3f}" for label, value in tried.items() if value is not None)
        share = 100 * (request.keep_score or 0)
        raise SqueezeError(
            f"no lower rank keeps {share:g} % of the validation score {reached:.3f} ({shown}); "
            "lower --keep-score, or train further at the lower rank with --steps"
        )
    folder = AdapterArtifact.load(found.chosen.folder).save(request.out / found.chosen.folder.name)
    found.chosen = replace(found.chosen, folder=folder)
    found.made = [found.chosen]


def _as_item(found: Squeezes) -> SqueezedAdapter:
    """Return the source as an adapter squeezed to its own rank, so that it is scored like the others."""
    return SqueezedAdapter(
        name=found.source.name,
        source=found.source,
        how="post",
        rank=found.rank,
        folder=found.folder.absolute(),
        parameters=found.parameters,
        bytes=found.bytes,
        energy={},
        seconds=0.0,
    )


def _track(request: SqueezeRequest, origin: Origin, found: Squeezes) -> None:
    if origin.tracker is None:
        return
    with MlflowTracker(origin.tracker) as tracker:
        for item in found.made:
            track_squeezed(
                tracker,
                item,
                parent=origin.run_id or None,
                settings=origin.settings,
                data={"data_digest": found.source.identity.data} if found.source.identity.data else {},
                after=found.scores.get(item.name, Measured()),
                before=found.scores.get(found.source.name, Measured()),
                source_bytes=found.bytes,
                plots=request.out.absolute() / WORK / "plots",
            )
    flush_spool(origin.tracker)


def squeeze_table(found: Squeezes) -> Table:
    """Return a table of the source and the results. A narrow terminal shortens names, never numbers."""
    scored = bool(found.scores)
    table = Table("adapter", "rank", "size", "energy")
    for header in ("val", "test [95 %]") if scored else ("least", "params"):
        table.add_column(header)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    source = found.source.name
    own = ["", human_count(found.parameters)]
    table.add_row(source, str(found.rank), human_bytes(found.bytes), "", *(_scores(found, source) or own))
    for item in found.made:
        own = [f"{item.energy_min:.4f}", human_count(item.parameters)]
        table.add_row(
            _short(item.folder),
            str(item.rank),
            human_bytes(item.bytes),
            f"{item.energy_mean:.4f}",
            *(_scores(found, item.name) or own),
            style="bold" if item is found.chosen else None,
        )
    return table


def _scores(found: Squeezes, name: str) -> list[str]:
    if not found.scores:
        return []
    measured = found.scores.get(name, Measured())
    val = measured.mean("val")
    return ["–" if val is None else f"{val:.3f}", score_text(measured.score("test"))]


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

"""`rayft squeeze`: an adapter folder made by anyone to lower ranks, scored and trained on where asked to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from rayft.artifacts import AdapterArtifact, folder_bytes
from rayft.errors import ResourceError, SqueezeError
from rayft.flow.cluster import cluster, has_gpus, join
from rayft.flow.config import load_config
from rayft.flow.display import Display
from rayft.flow.hold import hold
from rayft.flow.lanes import at_work
from rayft.flow.scoring import Measured, check_some, say_unscored
from rayft.flow.selection import keeps, smallest_good
from rayft.flow.squeeze import make as squeezing
from rayft.flow.squeeze.dense import Dense, dense_source, extract, lost_text
from rayft.flow.squeeze.make import Source, SqueezedAdapter, Target
from rayft.flow.squeeze.places import check_places, files_digest
from rayft.flow.squeeze.source import Origin, check_base, find_origin
from rayft.flow.squeeze.tracking import track_squeezed
from rayft.flow.sweep.identity import current_identity, recorded_sweep
from rayft.identity import UNKNOWN
from rayft.models.load import ModelConfig
from rayft.paths import check_folder
from rayft.report.text import human_bytes, human_count, score_text
from rayft.squeeze.rank import Progress, squeeze
from rayft.squeeze.section import ContinueConfig
from rayft.sweep.executor import EXECUTORS, Executor
from rayft.sweep.space import check_executor
from rayft.tracking.base import TrackerSpec
from rayft.tracking.mlflow import MlflowTracker, flush_spool
from rayft.train.run import RunConfig

__all__ = ["SqueezeRequest", "Squeezes", "squeeze_folder", "squeeze_request", "squeeze_table"]

WORK = ".work"
"""Folder in the output for what is no result: workers' logs, checkpoints, plots."""


@dataclass(frozen=True)
class SqueezeRequest:
    """What `rayft squeeze` was asked for."""

    source: Path
    out: Path
    targets: tuple[Target, ...] = ()
    keep_score: float | None = None
    """Share of the source's validation score that the smallest rank has to keep."""
    cont: ContinueConfig | None = None
    config: Path | None = None
    """The configuration that names the base and the data; that of the source's sweep where not given."""
    base: str | None = None
    device: str | None = None
    overwrite: bool = False
    """Whether adapters that rayft made otherwise are replaced."""


@dataclass
class Squeezes:
    """What came out of it."""

    source: Source
    bytes: int
    rank: int
    parameters: int
    made: list[SqueezedAdapter] = field(default_factory=list)
    scores: dict[str, Measured] = field(default_factory=dict)
    chosen: SqueezedAdapter | None = None
    """The smallest that keeps the score, where one was asked for."""
    note: str = ""
    """What a person has to know of the result."""


def squeeze_folder(request: SqueezeRequest, console: Console) -> Squeezes:
    """Squeeze a folder to all targets; what is wrong is found before the first is written.

    Raises:
        SqueezeError, ArtifactError, BaseMismatchError, ConfigError: naming what is wrong and what to do;
            the source stays as it is.
    """
    _check_request(request)
    with hold(request.out.absolute(), "--out"):
        return _squeeze_held(request, console)


def _squeeze_held(request: SqueezeRequest, console: Console) -> Squeezes:
    """Squeeze into a folder that is held."""
    dense = dense_source(request.source)
    if dense is not None:
        return _squeeze_dense(request, dense, console)
    artifact = AdapterArtifact.load(request.source)
    origin = find_origin(request.source, artifact, request.config)
    run = _run(request, origin)
    unchecked = check_base(artifact, request.base, run)
    wanted = _wanted(request, artifact.rank)
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
    size = folder_bytes(request.source)
    found = Squeezes(source, size, artifact.rank, artifact.parameters, note=unchecked)
    searching = not request.targets
    with tempfile.TemporaryDirectory() as scratch:
        # What a search tries and leaves is no result.
        folder = Path(scratch) if searching else request.out
        found.made = [squeezing.make(full, target, source, folder) for target in wanted]
        if run is not None and measured:
            _with_lanes(request, run, origin, found, Display(console), folder)
        if searching:
            _keep_chosen(request, found)
    _track(request, origin, found)
    return found


def _squeeze_dense(request: SqueezeRequest, dense: Dense, console: Console) -> Squeezes:
    """Extract a LoRA from what has no factors, and bring that to all targets."""
    if request.keep_score is not None or request.cont is not None:
        raise SqueezeError(
            f"{request.source} has no factors yet: extract a LoRA first (--rank 64), then squeeze that by "
            "its score or train it on"
        )
    config = load_config(request.config).model if request.config else None
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
    found = Squeezes(source, size, full.rank, full.parameters, note=lost_text(extraction))
    found.made = [squeezing.make(full, target, source, request.out) for target in request.targets]
    return found


def _check_request(request: SqueezeRequest) -> None:
    if not request.targets and request.keep_score is None:
        raise SqueezeError(
            "say how far: --rank 8 (may be repeated), --energy 0.95, --budget 1.5MB, or --keep-score 0.98"
        )
    if request.keep_score is not None and not 0 < request.keep_score <= 1:
        raise SqueezeError(f"--keep-score {request.keep_score:g} is not in (0, 1]; 0.98 keeps 98 % of it")
    labels = [target.label for target in request.targets]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise SqueezeError(f"two targets would both be written to {request.out / twice}; ask for one of them")
    check_folder(request.out, "--out")
    _check_device(request.device)


def _check_device(name: str | None) -> None:
    try:
        device = torch.device("cpu" if name is None else name)
    except RuntimeError as error:
        raise SqueezeError(f"--device {name} is no device; write cpu, cuda or cuda:1") from error
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda"):
        raise SqueezeError(f"--device {name} can't be used; write cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ResourceError(
            f"--device {name}: this machine has {count} GPUs; write --device cpu, or leave it out"
        )


def _run(request: SqueezeRequest, origin: Origin) -> RunConfig | None:
    if origin.config is None:
        if request.keep_score is not None or request.cont is not None:
            raise SqueezeError(
                "scoring and further training need the base and the data: give the configuration of a sweep "
                "with --config, or a folder below a sweep's output"
            )
        return None
    join()
    run = origin.config.run(has_gpus())
    return run.model_copy(update={"optim": run.optim.model_copy(update={"lr": origin.lr or run.optim.lr})})


def _wanted(request: SqueezeRequest, rank: int) -> list[Target]:
    """List the targets; for a score alone every power of two below the rank."""
    if request.targets:
        return list(request.targets)
    halves = [2**power for power in range(rank.bit_length() - 1, -1, -1) if 2**power < rank]
    if not halves:
        raise SqueezeError(f"{request.source} is of rank {rank}: there is no lower one that could be tried")
    return [Target(rank=half) for half in halves]


@contextmanager
def _bar(console: Console, modules: int | None) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("modules", total=modules)
        yield lambda done: bar.advance(task, done)


def _with_lanes(
    request: SqueezeRequest, run: RunConfig, origin: Origin, found: Squeezes, display: Display, folder: Path
) -> None:
    """Train on and score in a lane, as a sweep does."""
    assert origin.config is not None
    kind = check_executor(origin.config.sweep, run)
    with cluster(run.scale.workers, device=run.scale.device, gpu_share=run.scale.gpu_share):
        executor = EXECUTORS[kind](
            run.scale, str(folder.absolute() / WORK / "ray"), 1, origin.config.sweep.restarts, "squeeze"
        )
        with at_work(executor, display):
            with display.stage("start a worker"):
                executor.start()
            with display.stage("train on and score"), display.watch(executor.broker):
                _measure(request, executor, found, folder.absolute() / WORK, origin.tracker, display)


def _measure(
    request: SqueezeRequest,
    executor: Executor,
    found: Squeezes,
    folder: Path,
    tracker: TrackerSpec | None,
    display: Display,
) -> None:
    """Train on and score.

    A squeezed adapter that can't be scored is named, and its folder stays; the others are scored.

    Raises:
        TrainError: if the source can't be scored, or none of what was made of it.
    """
    if request.cont is not None:
        found.made += squeezing.continue_all(executor, found.made, request.cont, folder, tracker)
    source = _as_item(request, found)
    found.scores = squeezing.score(executor, [source], ("val",))
    check_some(found.scores)
    reached = found.scores[source.name].mean("val") or 0.0
    keep = request.keep_score
    for item in sorted(found.made, key=lambda item: -item.parameters):
        found.scores |= squeezing.score(executor, [item], ("val",))
        if found.scores[item.name].error:
            continue
        lost = keep is not None and not keeps(found.scores[item.name].mean("val") or 0.0, reached, keep)
        if lost and not request.targets and request.cont is None:
            break  # Lower ranks lose more.
    check_some({item.name: found.scores[item.name] for item in found.made if item.name in found.scores})
    scored = [item for item in found.made if item.name in found.scores and not found.scores[item.name].error]
    if keep is not None:
        found.chosen = smallest_good(scored, found.scores, reached, keep)
    # The test part is read for what is reported: the source, and what was asked for or chosen.
    reported = scored if request.targets else [found.chosen] if found.chosen else []
    for name, measured in squeezing.score(executor, [source, *reported], ("test",)).items():
        found.scores[name] = Measured({**found.scores[name].parts, **measured.parts}, measured.error)
    check_some({source.name: found.scores[source.name]})
    say_unscored(found.scores, display.say)


def _keep_chosen(request: SqueezeRequest, found: Squeezes) -> None:
    """Bring what a search chose to the output folder, and forget the rest."""
    if found.chosen is None:
        reached = found.scores[found.source.name].mean("val") or 0.0
        tried = {
            item.label: found.scores[item.name].mean("val")
            for item in found.made
            if item.name in found.scores
        }
        told = ", ".join(f"{label} {value:.3f}" for label, value in tried.items() if value is not None)
        share = 100 * (request.keep_score or 0)
        raise SqueezeError(
            f"no lower rank keeps {share:g} % of the validation score {reached:.3f} ({told}); "
            "lower --keep-score, or train on at the lower rank with --steps"
        )
    folder = AdapterArtifact.load(found.chosen.folder).save(request.out / found.chosen.folder.name)
    found.chosen = replace(found.chosen, folder=folder)
    found.made = [found.chosen]


def _as_item(request: SqueezeRequest, found: Squeezes) -> SqueezedAdapter:
    """Take the source for a squeezed adapter of its own rank, to be scored like one."""
    return SqueezedAdapter(
        name=found.source.name,
        source=found.source,
        how="post",
        rank=found.rank,
        folder=request.source.absolute(),
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


def squeeze_request(
    source: Path,
    out: Path,
    *,
    ranks: Sequence[int] = (),
    energies: Sequence[float] = (),
    budgets: Sequence[str] = (),
    keep_score: float | None = None,
    steps: int | None = None,
    lr: float | None = None,
    config: Path | None = None,
    base: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> SqueezeRequest:
    """Put a request together from what a command line says.

    Raises:
        SqueezeError: if a number makes no sense.
    """
    if steps is not None and steps < 1:
        raise SqueezeError(f"--steps {steps} trains nothing; give 1 or more, or leave it out")
    if lr is not None and (steps is None or lr <= 0):
        raise SqueezeError("--lr is the learning rate of --steps, and above 0")
    targets = [Target(rank=rank) for rank in ranks]
    targets += [Target(energy=energy) for energy in energies]
    targets += [Target(budget=budget) for budget in budgets]
    return SqueezeRequest(
        source=source,
        out=out,
        targets=tuple(dict.fromkeys(targets)),
        keep_score=keep_score,
        cont=None if steps is None else ContinueConfig(steps=steps, lr=lr),
        config=config,
        base=base,
        device=device,
        overwrite=overwrite,
    )


def squeeze_table(found: Squeezes) -> Table:
    """Show the source and what was made of it; sizes and scores are never cut, names may be."""
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

"""`rayft analyze`: measure bounds, spectra, sharpness, landscapes and the gap of adapters, in lanes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from pydantic import ValidationError

from rayft.analysis.record import FILE as ANALYSIS_FILE
from rayft.analysis.record import PIECES, AdapterAnalysis, SweepAnalysis
from rayft.analysis.section import PARTS, READERS, AnalyzeConfig
from rayft.config import in_one_line, parse
from rayft.errors import ArtifactError, ReportError
from rayft.flow.analyze.source import Item, Sources, find_items
from rayft.flow.analyze.summarize import known, summarize
from rayft.flow.analyze.tracking import track_analysis
from rayft.flow.cluster import cluster, join
from rayft.flow.display import Display
from rayft.flow.lanes import use_lanes
from rayft.flow.options import refuse_unused
from rayft.paths import check_folder
from rayft.report.record import SweepRecord
from rayft.sweep.executor import EXECUTORS, Executor
from rayft.sweep.jobs import Job, Outcome
from rayft.sweep.space import check_executor
from rayft.tracking.mlflow import MlflowTracker, flush_spool

__all__ = ["analyze_items", "analyze_target", "completed", "earlier_analysis"]


def analyze_items(
    executor: Executor,
    items: Sequence[Item],
    config: AnalyzeConfig,
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
) -> list[AdapterAnalysis]:
    """Analyse adapters and tuned models in all lanes at once.

    The findings of each are kept in the folder as they arrive, until `SweepAnalysis.save` has all of them. An
    analysis that was interrupted continues with the items whose findings are missing, are damaged or have
    notes.

    Args:
        executor: of the lanes.
        items: what to analyse.
        config: the parts of the analysis, and their settings.
        folder: where findings are kept.
        say: called with a sentence for each file of findings that can't be read.

    Returns:
        The findings, in the order of `items`. An item that fails as a whole has the reason in its notes.
    """
    # Computed once, because it reads all bytes of an adapter.
    weights = {item.name: item.weights for item in items}
    places = {
        item.name: folder / PIECES / f"{_identity(item, weights[item.name], config)}.json" for item in items
    }
    found = {item.name: one for item in items if (one := _piece(places[item.name], item, say)) is not None}
    todo = {f"analyse {item.name}": item for item in items if item.name not in found}
    for key, analysed in executor.run([Job.of(key, item.request(config)) for key, item in todo.items()]):
        item = todo[key]
        one = _finding(item, config, analysed)
        one = one.model_copy(update={"weights": weights[item.name], "inputs": item.inputs})
        one.write(places[item.name])
        found[item.name] = one
    return [found[item.name] for item in items]


def _finding(item: Item, config: AnalyzeConfig, analysed: Outcome[AdapterAnalysis]) -> AdapterAnalysis:
    if analysed.result is not None:
        return analysed.result
    why = analysed.error.splitlines()[0]
    return AdapterAnalysis(name=item.name, group=item.group, notes=dict.fromkeys(config.parts, why))


def _identity(item: Item, weights: str, config: AnalyzeConfig) -> str:
    """Return a file name that identifies what the findings of an adapter depend on."""
    given = "\0".join((item.name, item.group, weights, config.model_dump_json()))
    return hashlib.sha256(given.encode()).hexdigest()[:24]


def _piece(place: Path, item: Item, say: Callable[[str], None]) -> AdapterAnalysis | None:
    """Return the kept findings of an adapter; None if it has to be analysed (again)."""
    try:
        one = item.with_inputs(AdapterAnalysis.model_validate_json(place.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, ArtifactError) as error:
        say(f"{item.name} is analysed again: {place} is damaged ({in_one_line(error)})")
        return None
    # What a note reports may have been put right meanwhile.
    return None if one.notes or one.inputs != item.inputs else one


def completed(
    found: Sequence[AdapterAnalysis], config: AnalyzeConfig, earlier: SweepAnalysis | None
) -> tuple[list[AdapterAnalysis], AnalyzeConfig]:
    """Add findings of an earlier analysis for other parts, if settings, weights, data and base are the same.

    Returns:
        The findings, and the configuration with the parts of both analyses.
    """
    if earlier is None or not earlier.covers(config):
        return [*found], config
    before = {one.name: one for one in earlier.adapters}
    kept = []
    for one in found:
        other = before.get(one.name)
        same = other is not None and _of(other) == _of(one)
        kept.append(one.completed(other) if other is not None and same else one)
    parts = [part for part in PARTS if part in (*config.parts, *earlier.config.parts)]
    return kept, config.model_copy(update={"parts": tuple(parts)})


def _of(one: AdapterAnalysis) -> tuple[str, str, str]:
    return one.group, one.weights, one.inputs


def analyze_target(
    target: str,
    display: Display,
    *,
    parts: Sequence[str] = (),
    overrides: Sequence[str] = (),
    config: Path | None = None,
    out: Path | None = None,
    uri: str | None = None,
    overwrite: bool = False,
) -> tuple[SweepAnalysis, Path]:
    """Analyse a sweep's folder, an adapter's folder, or a tracked run.

    Args:
        target: a folder, or the id of a run.
        display: shows the stages.
        parts: of the analysis. By default those of the configuration, or gap, bounds and spectra.
        overrides: settings of the analysis, such as `samples=50`.
        config: file of a configuration that names base and data, for an adapter outside of any sweep.
        out: folder for analysis.json. If not given, the target, or for a run the working directory.
        uri: tracking server of a run.
        overwrite: whether an analysis of other adapters is replaced.

    Returns:
        The analysis, and the folder that it is saved in. It includes the parts of an earlier analysis there
        with the same settings.

    Raises:
        RayftError: naming what is missing, before workers start.
    """
    join()
    with tempfile.TemporaryDirectory() as scratch:
        sources = find_items(target, config, uri, Path(scratch))
        if sources.note:
            display.say(sources.note)
        wanted = _config(sources, parts, overrides)
        place = out or sources.folder
        check_folder(place, "--out")
        earlier = earlier_analysis(place, {item.name for item in sources.items}, overwrite=overwrite)
        earlier = None if earlier is None else _with_inputs(earlier, sources.items)
        how, scale = sources.settings.execution, sources.items[0].run.scale
        lanes, kind = min(how.lanes, len(sources.items)), check_executor(how, sources.items[0].run)
        with cluster(lanes * scale.workers, device=scale.device, gpu_share=scale.gpu_share):
            executor = EXECUTORS[kind](scale, str(Path(scratch) / "ray"), lanes, how.restarts, "analyze")
            found = _in_lanes(executor, sources.items, wanted, display, place)
            found, wanted = completed(found, wanted, earlier)
            summary = summarize(sources.items, found, wanted, *_of_sweep(Path(target)))
            summary.save(place)
            if sources.tracker is not None:
                _track(sources, summary, place / "plots", display)
    return summary, place


def earlier_analysis(folder: Path, names: Collection[str], *, overwrite: bool) -> SweepAnalysis | None:
    """Return the analysis in a folder (None if there is none), and check that it may be replaced.

    Args:
        folder: where analysis.json will be written.
        names: the adapters that are analysed now.
        overwrite: whether an analysis of other adapters is replaced.

    Raises:
        ReportError: if the file is not an analysis of rayft's, or has adapters that are not analysed now.
    """
    try:
        earlier = SweepAnalysis.find(folder)
    except ReportError:
        # It may be of another version. A file without the keys of an analysis is a user's.
        text = (folder / ANALYSIS_FILE).read_bytes()
        if text.strip(b"\0") and not all(word in text for word in (b'"config"', b'"parts"')):
            raise
        return None
    lost = sorted({one.name for one in earlier.adapters} - {*names}) if earlier else []
    if lost and not overwrite:
        raise ReportError(
            f"{folder} has an analysis of {lost[0]}, which would be lost; choose another folder with --out, "
            "or replace it with --overwrite"
        )
    return earlier


def _with_inputs(earlier: SweepAnalysis, items: Sequence[Item]) -> SweepAnalysis:
    """Complete the findings of rayft 0.1.0, which lack the hash of data and base."""
    named = {item.name: item for item in items}
    adapters = [named[one.name].with_inputs(one) if one.name in named else one for one in earlier.adapters]
    return earlier.model_copy(update={"adapters": tuple(adapters)})


def _config(sources: Sources, parts: Sequence[str], overrides: Sequence[str]) -> AnalyzeConfig:
    """Return the parts and settings: as asked for, else as configured, else the parts that are cheap."""
    data = sources.settings.analyze.model_dump(mode="json")
    asked = [part for given in parts for part in given.split(",")]
    data["parts"] = asked or data["parts"] or ["gap", "bounds", "spectra"]
    plain = [override.removeprefix("analyze.") for override in overrides]
    config = parse(AnalyzeConfig, data, plain)
    for key in (override.partition("=")[0].strip() for override in plain):
        if not {*READERS.get(key, config.parts)} & {*config.parts}:
            why = f"{', '.join(READERS[key])} read it, and {', '.join(config.parts)} are done"
            refuse_unused({f"--set {key}": True}, why)
    return config


def _in_lanes(
    executor: Executor, items: Sequence[Item], config: AnalyzeConfig, display: Display, place: Path
) -> list[AdapterAnalysis]:
    with use_lanes(executor, display):
        with display.stage("start workers"):
            executor.start()
        with (
            display.stage(f"analyse {len(items)} adapter{'s' if len(items) > 1 else ''}"),
            display.watch(executor.broker),
        ):
            return analyze_items(executor, items, config, place, display.say)


def _track(sources: Sources, summary: SweepAnalysis, plots: Path, display: Display) -> None:
    assert sources.tracker is not None
    runs = {item.name: item.run_id for item in sources.items}
    with display.stage("draw and track"), MlflowTracker(sources.tracker) as tracker:
        track_analysis(tracker, summary, runs, plots)
    flush_spool(sources.tracker)


def _of_sweep(folder: Path) -> tuple[dict[str, float], set[str]]:
    return known(SweepRecord.load(folder)) if (folder / "sweep.json").is_file() else ({}, set())

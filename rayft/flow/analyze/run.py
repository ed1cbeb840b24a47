"""`rayft analyze`: bounds, spectra, sharpness, landscapes and the gap of adapters, and what predicts what."""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import ray
from pydantic import ValidationError

from rayft.analysis.predict import LEAST, Run, correlations
from rayft.analysis.record import FILE as ANALYSIS_FILE
from rayft.analysis.record import PIECES, AdapterAnalysis, Predictor, SweepAnalysis
from rayft.analysis.section import PARTS, AnalyzeConfig
from rayft.analysis.spectral import principal_angles
from rayft.artifacts import AdapterArtifact
from rayft.config import parse
from rayft.errors import ArtifactError, ReportError
from rayft.flow.analyze.source import Item, Sources, find_items
from rayft.flow.analyze.tracking import track_analysis
from rayft.flow.cluster import cluster, join
from rayft.flow.display import Display
from rayft.flow.lanes import at_work
from rayft.methods.base import LoraFactors
from rayft.models.methods import method
from rayft.paths import check_folder
from rayft.report.record import SweepRecord
from rayft.sweep.broker import Event, Job
from rayft.sweep.executor import EXECUTORS, Executor
from rayft.sweep.space import check_executor
from rayft.tracking.mlflow import MlflowTracker, flush_spool

__all__ = ["analyze_items", "analyze_target", "completed", "earlier_analysis", "known", "summarize"]

ANGLES_OF, ANGLE_MODULES, ANGLE_TOP = 4, 12, 8
"""Adapters (of different settings) that are compared in pairs, their modules, directions of each module."""


def analyze_items(
    executor: Executor,
    items: Sequence[Item],
    config: AnalyzeConfig,
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
) -> list[AdapterAnalysis]:
    """Analyse in the lanes, as many at once as there are; what fails as a whole says so in its notes.

    Each adapter's findings are kept in the folder as they come, until `SweepAnalysis.save` has all of them:
    an analysis that was interrupted continues with those that are missing or damaged, or have notes.

    Args:
        executor: of the lanes.
        items: what to analyse.
        config: the parts, and their settings.
        folder: where findings are kept.
        say: called with a sentence for each finding that can't be read.
    """
    # All of an adapter's bytes are read for it: once.
    weights = {item.name: item.weights for item in items}
    places = {
        item.name: folder / PIECES / f"{_identity(item, weights[item.name], config)}.json" for item in items
    }
    found = {item.name: one for item in items if (one := _piece(places[item.name], item, say)) is not None}
    todo = {f"analyse {item.name}": item for item in items if item.name not in found}
    executor.submit([Job.of(key, "analyse", item.request(config)) for key, item in todo.items()])
    waiting = {executor.broker.next_event.remote(key): item for key, item in todo.items()}
    while waiting:
        (ready,), _ = ray.wait([*waiting], num_returns=1)
        item = waiting.pop(ready)
        one = _finding(item, config, ray.get(ready))
        one = one.model_copy(update={"weights": weights[item.name], "inputs": item.inputs})
        one.write(places[item.name])
        found[item.name] = one
    return [found[item.name] for item in items]


def _finding(item: Item, config: AnalyzeConfig, event: Event) -> AdapterAnalysis:
    event.raise_fatal()
    if event.kind == "final":
        return AdapterAnalysis.model_validate_json(event.values["analysis"])
    why = str(event.values.get("error", "it was interrupted")).splitlines()[0]
    return AdapterAnalysis(name=item.name, group=item.group, notes=dict.fromkeys(config.parts, why))


def _identity(item: Item, weights: str, config: AnalyzeConfig) -> str:
    """Give what an adapter's findings depend on, as a name."""
    given = "\0".join((item.name, item.group, weights, config.model_dump_json()))
    return hashlib.sha256(given.encode()).hexdigest()[:24]


def _piece(place: Path, item: Item, say: Callable[[str], None]) -> AdapterAnalysis | None:
    """Read what was found of an adapter; None if it was found with other data or on another base."""
    try:
        one = item.with_inputs(AdapterAnalysis.model_validate_json(place.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, ArtifactError) as error:
        say(f"{item.name} is analysed again: {place} is damaged ({str(error).splitlines()[0]})")
        return None
    # A reason may be gone by now.
    return None if one.notes or one.inputs != item.inputs else one


def completed(
    found: Sequence[AdapterAnalysis], config: AnalyzeConfig, earlier: SweepAnalysis | None
) -> tuple[list[AdapterAnalysis], AnalyzeConfig]:
    """Keep what an earlier analysis found of other parts with the same settings, weights, data and base."""
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


def summarize(
    items: Sequence[Item],
    found: Sequence[AdapterAnalysis],
    config: AnalyzeConfig,
    losses: Mapping[str, float],
    chosen: Collection[str] = (),
) -> SweepAnalysis:
    """Correlate all measures with the gap, and compare adapters with each other.

    Args:
        items: what was analysed.
        found: what came out, in the same order.
        config: what was asked for.
        losses: name → validation loss, a measure as any other.
        chosen: names of each method's trials at its best setting, which are correlated alone as well.
    """
    known = [
        one.model_copy(update={"measures": {**one.measures, **_own(losses.get(one.name))}}) for one in found
    ]
    runs = {
        one.name: Run(one.group, one.gap.value, _candidates(one.measures), one.gap.train, one.gap.held_out)
        for one in known
        if one.gap is not None
    }
    best = [run for name, run in runs.items() if name in chosen]
    note = ""
    predictors: list[Predictor] = []
    among_best: list[Predictor] = []
    if "gap" in config.parts:
        try:
            predictors = correlations([*runs.values()], config.seed)
            # Where these are all that there are the same would stand there twice.
            among_best = correlations(best, config.seed) if LEAST <= len(best) < len(runs) else []
        except ReportError as error:
            note = str(error)
    else:
        note = "the gap was not measured (analyze.parts has no gap), so nothing is correlated with it"
    return SweepAnalysis(
        config=config, adapters=tuple(known), predictors=tuple(predictors), chosen=tuple(among_best),
        note=note, angles=_angles(items),
    )  # fmt: skip


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
        display: tells what happens.
        parts: of the analysis; those of the configuration where not given, else gap, bounds and spectra.
        overrides: `analyze.samples=50` and the like.
        config: a configuration that names base and data, for an adapter that lies in no sweep.
        out: folder for analysis.json; the target, or for a run the working folder, where not given.
        uri: tracking server of a run.
        overwrite: whether an analysis of other adapters is replaced.

    Returns:
        What was found, and the folder that has it; with what an earlier analysis with the same settings
        found there and this one didn't look for.

    Raises:
        RayftError: naming what is missing, before workers are started.
    """
    join()
    with tempfile.TemporaryDirectory() as scratch:
        sources = find_items(target, config, uri, Path(scratch))
        wanted = _config(sources, parts, overrides)
        place = out or sources.folder
        check_folder(place, "--out")
        earlier = earlier_analysis(place, {item.name for item in sources.items}, overwrite=overwrite)
        earlier = None if earlier is None else _with_inputs(earlier, sources.items)
        scale, lanes = sources.items[0].run.scale, min(sources.settings.sweep.lanes, len(sources.items))
        kind = check_executor(sources.settings.sweep, sources.items[0].run)
        with cluster(lanes * scale.workers, device=scale.device, gpu_share=scale.gpu_share):
            restarts = sources.settings.sweep.restarts
            executor = EXECUTORS[kind](scale, str(Path(scratch) / "ray"), lanes, restarts, "analyze")
            found = _in_lanes(executor, sources.items, wanted, display, place)
            found, wanted = completed(found, wanted, earlier)
            summary = summarize(sources.items, found, wanted, *_of_sweep(Path(target)))
            summary.save(place)
            if sources.tracker is not None:
                _track(sources, summary, place / "plots", display)
    return summary, place


def earlier_analysis(folder: Path, names: Collection[str], *, overwrite: bool) -> SweepAnalysis | None:
    """Read the analysis that a folder has, and refuse to replace another's.

    Args:
        folder: where analysis.json will be written.
        names: the adapters that are analysed now.
        overwrite: whether an analysis of other adapters is replaced.
    """
    try:
        earlier = SweepAnalysis.find(folder)
    except ReportError:
        # Of another version, perhaps; a file that has none of an analysis's words is somebody else's.
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
    """Complete what rayft 0.1.0 found of adapters."""
    named = {item.name: item for item in items}
    adapters = [named[one.name].with_inputs(one) if one.name in named else one for one in earlier.adapters]
    return earlier.model_copy(update={"adapters": tuple(adapters)})


def _config(sources: Sources, parts: Sequence[str], overrides: Sequence[str]) -> AnalyzeConfig:
    """Decide what is done: what was asked for, else what the configuration has, else what is cheap."""
    data = sources.settings.analyze.model_dump(mode="json")
    asked = [part for given in parts for part in given.split(",")]
    data["parts"] = asked or data["parts"] or ["gap", "bounds", "spectra"]
    plain = [override.removeprefix("analyze.") for override in overrides]
    return parse(AnalyzeConfig, data, plain)


def _in_lanes(
    executor: Executor, items: Sequence[Item], config: AnalyzeConfig, display: Display, place: Path
) -> list[AdapterAnalysis]:
    with at_work(executor, display):
        with display.stage("start workers"):
            executor.start()
        with display.stage(f"analyse {len(items)} adapters"), display.watch(executor.broker):
            return analyze_items(executor, items, config, place, display.say)


def _track(sources: Sources, summary: SweepAnalysis, plots: Path, display: Display) -> None:
    assert sources.tracker is not None
    runs = {item.name: item.run_id for item in sources.items}
    with display.stage("draw and track"), MlflowTracker(sources.tracker) as tracker:
        track_analysis(tracker, summary, runs, plots)
    flush_spool(sources.tracker)


def _of_sweep(folder: Path) -> tuple[dict[str, float], set[str]]:
    return known(SweepRecord.load(folder)) if (folder / "sweep.json").is_file() else ({}, set())


def known(record: SweepRecord) -> tuple[dict[str, float], set[str]]:
    """Give a sweep's validation losses, and the trials of each method's best setting."""
    losses = {trial.id: trial.last_val_loss for trial in record.trials if trial.last_val_loss is not None}
    return losses, {name for one in record.methods for name in one.trials}


def _own(loss: float | None) -> dict[str, float]:
    return {} if loss is None else {"val_loss": loss}


def _candidates(measures: Mapping[str, float]) -> dict[str, float]:
    """Leave out what the gap is made of: it would correlate with itself."""
    parts = ("gap", "gap_low", "gap_high", "sample_train_loss", "sample_test_loss")
    return {name: value for name, value in measures.items() if name not in parts and math.isfinite(value)}


def _angles(items: Sequence[Item]) -> dict[str, tuple[float, ...]]:
    """Compare what the first adapters of different settings write to: median angles over some modules."""
    loaded: dict[str, Mapping[str, LoraFactors]] = {}
    for item in {item.group: item for item in reversed(items)}.values():
        if len(loaded) < ANGLES_OF and method(item.run.method.name).exports_lora:
            # One that can't be read has said so in its notes.
            with contextlib.suppress(ArtifactError):
                loaded[item.name] = AdapterArtifact.load(item.folder).modules
    names, found = [*loaded], {}
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            common = [path for path in loaded[one] if path in loaded[other]]
            chosen = common[:: max(1, len(common) // ANGLE_MODULES)][:ANGLE_MODULES]
            angles = [
                principal_angles(loaded[one][path], loaded[other][path], "output", ANGLE_TOP).numpy()
                for path in chosen
            ]
            length = min((len(each) for each in angles), default=0)
            if length:
                median = np.median([each[:length] for each in angles], axis=0)
                found[f"{one} / {other}"] = tuple(map(float, median))
    return found

"""Find what a target of `rayft analyze` stands for: its adapters, their base and data, and the tracker."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayft.analysis.job import AnalyzeRequest
from rayft.analysis.record import AdapterAnalysis
from rayft.analysis.section import AnalyzeConfig
from rayft.artifacts.meta import META_FILE, ArtifactMeta
from rayft.artifacts.read import read_meta
from rayft.config import parse
from rayft.errors import ConfigError, ReportError
from rayft.flow.cluster import has_gpus
from rayft.flow.config import TrainConfig, load_config, load_train_config
from rayft.flow.options import refuse_unused
from rayft.flow.origin import find_origin
from rayft.flow.scoring import outcome
from rayft.flow.sweep.folder import STAMP_FILE
from rayft.flow.sweep.identity import current_identity
from rayft.flow.target import Place, at_rank, find_place, registry_uri
from rayft.identity import UNKNOWN, Identity
from rayft.models.base import pinned
from rayft.registry.ref import AdapterRef
from rayft.report.record import SweepRecord
from rayft.sweep.space import points
from rayft.tracking.base import TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.mlflow import prepare, resolve_runs
from rayft.tracking.runs import read_run
from rayft.train.run import RunConfig

__all__ = ["Item", "Sources", "find_items"]


@dataclass(frozen=True)
class Item:
    """An adapter or a tuned model to analyse."""

    name: str
    run: RunConfig
    """Run that made it, or one with its method, base and data."""
    folder: Path
    run_id: str = ""
    """Its tracked run; empty if there is none."""
    identity: Identity = UNKNOWN
    """Identity of data and base as they are now."""

    @property
    def inputs(self) -> str:
        """Hash of data and base; empty if they are unknown."""
        return self.identity.inputs if self.identity.data else ""

    def with_inputs(self, found: AdapterAnalysis) -> AdapterAnalysis:
        """Return findings with the hash of data and base, which those of rayft 0.1.0 lack.

        That version analysed with the data of the training. If the present data or base differ from those,
        no hash is added, and the findings are not used again.
        """
        if found.inputs or self.made_from.differences(self.identity):
            return found
        return found.model_copy(update={"inputs": self.inputs})

    @property
    def made_from(self) -> Identity:
        """Identity of the data and base of its training, according to its folder."""
        path = self.folder / META_FILE
        # A whole model has none.
        meta = read_meta(self.folder, {}) if path.is_file() else ArtifactMeta()
        return Identity(data=meta.data_digest, fingerprint=meta.base_fingerprint)

    @property
    def group(self) -> str:
        """Name of its settings, which runs share that differ only in their seed."""
        return self.run.setting

    @property
    def weights(self) -> str:
        """Hash (16 hex digits) of its files of weights."""
        found = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()[:16]

    def request(self, config: AnalyzeConfig) -> AnalyzeRequest:
        """Return the request of the job that analyses it."""
        run, adapter = outcome(self.run, str(self.folder))
        return AnalyzeRequest(
            name=self.name,
            run=run,
            config=config,
            adapter=adapter,
            group=self.group,
            base=None if adapter else self.run.model,
            expected=self.identity if adapter else self.identity.of_data(),
        )


@dataclass(frozen=True)
class Sources:
    """What a target of `rayft analyze` stands for."""

    settings: TrainConfig
    items: tuple[Item, ...]
    tracker: TrackerSpec | None
    folder: Path
    """Folder for the results if the user names none."""
    note: str = ""
    """What could not be read of them; empty if nothing."""


def find_items(target: str, config: Path | None, uri: str | None, scratch: Path) -> Sources:
    """Return what a target stands for.

    Args:
        target: a sweep's output folder, the id of a tracked run, or an adapter as `find_place` reads it.
        config: file of a configuration that names base and data.
        uri: MLflow, for a tracked run and for `models:/…`.
        scratch: folder for what is downloaded, and for an adapter at a lower rank.

    Raises:
        ReportError: if there is nothing in it that can be analysed.
        ConfigError: if base or data are not known, or for a configuration or server that is not read.
    """
    path = Path(target)
    if (path / "sweep.json").is_file():
        refuse_unused({"--config": config, "--uri": uri}, f"the sweep in {path} has its own")
        return _of_sweep(path)
    if re.fullmatch(r"[0-9a-f]{32}", target) and not path.is_dir():
        return _of_run(target, config, uri, scratch)
    place = find_place(target, registry_uri(target, uri), scratch)
    if place.folder.is_dir():
        return _of_adapter(place, config, path if path.is_dir() else Path.cwd(), scratch)
    raise ReportError(
        f"{target} is neither a folder nor a run id; give a sweep's output folder, an adapter folder, or the "
        "32 digits of a tracked run"
    )


def _of_sweep(path: Path) -> Sources:
    record, settings = SweepRecord.load(path), load_config(path / STAMP_FILE)
    run = settings.run(has_gpus())
    runs = {point.name: point.run for point in points(settings.sweep, run)}
    identity = current_identity(run, path)
    tracker = prepare(tracker_spec(settings.tracking, path))
    ids = resolve_runs(tracker, [trial.run_id for trial in record.trials])
    winner = record.winner.trial if record.winner else ""
    items = [
        Item(trial.id, runs[trial.id], Path(trial.folder), ids[trial.run_id], identity)
        for trial in record.trials
        if trial.status == "finished" or trial.id == winner
        if trial.folder and trial.id in runs and Path(trial.folder).is_dir()
    ]
    if not items:
        raise ReportError(
            f"{path} has no finished trial whose adapter is still there: there is nothing to analyse"
        )
    return Sources(settings, tuple(items), tracker, path)


def _of_adapter(place: Place, config: Path | None, out: Path, scratch: Path) -> Sources:
    """Return what there is to analyse of an adapter, whose results are for the folder `out`."""
    artifact = at_rank(place)
    origin = find_origin(place.folder, artifact, config)
    if origin.config is None:
        raise ConfigError(
            f"{place.name} lies in no folder of a sweep, so its base and data are not known: give a "
            "configuration that names them with --config"
        )
    run = origin.config.run(has_gpus())
    name = artifact.meta.method or "lora"
    method = run.method.model_copy(update={"name": name})
    run = run.model_copy(update={"method": method, "model": pinned(run.model, artifact)})
    identity = current_identity(run, origin.sweep)
    whole = place.rank is None
    folder = place.folder.absolute() if whole else artifact.save(scratch / "source")
    name = AdapterRef.parse(place.name).name if place.registered else origin.name
    name = name if whole else f"{name}@r{place.rank}"
    # The tracked run is the whole adapter's.
    item = Item(name, run, folder, origin.run_id if whole else "", identity)
    return Sources(origin.config, (item,), origin.tracker, out, origin.note)


def _of_run(run_id: str, config: Path | None, uri: str | None, scratch: Path) -> Sources:
    spec = tracker_spec(TrackingConfig(uri=uri), scratch)
    stored = read_run(spec.uri, run_id, scratch)
    if stored.adapter is None:
        raise ReportError(
            f"run {run_id} ({stored.name}) has stored no adapter, so there is nothing to analyse: give the "
            "run of a trial"
        )
    run = _run_of(stored.params)
    settings = load_train_config(config) if config is not None else None
    if run is None and settings is None:
        raise ConfigError(
            f"the parameters of run {run_id} don't name base and data completely: give a configuration that "
            "does with --config"
        )
    if settings is None:
        assert run is not None
        settings = TrainConfig(model=run.model, data=run.data)
    run = run or settings.run(has_gpus())
    run = run.model_copy(update={"scale": settings.run(has_gpus()).scale})
    tracker = prepare(replace(spec, spool=scratch / "spool"))
    item = Item(stored.name, run, stored.adapter, run_id, current_identity(run))
    return Sources(settings, (item,), tracker, Path.cwd())


def _run_of(params: Mapping[str, str]) -> RunConfig | None:
    """Return the configuration of a run, read from its tracked parameters; None if some are missing."""
    data: dict[str, Any] = {}
    for name, text in params.items():
        section, _, _ = name.partition(".")
        if section not in RunConfig.model_fields:
            continue
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        node = data
        *above, last = name.split(".")
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    try:
        return parse(RunConfig, data)
    except ConfigError:
        return None

"""Every check that needs no cluster, before one starts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray._common.utils import get_default_ray_temp_dir

from rayft.config import content_hash, leaves
from rayft.data.chat_format import ChatFormat
from rayft.data.loader import Schedule
from rayft.data.pack import AnyEncoded
from rayft.data.source import Parts, read
from rayft.data.template import encode_all
from rayft.errors import ConfigError, DiskFullError, ResourceError
from rayft.evaluate.tasks import perfect_answers
from rayft.files import write_file
from rayft.flow.cluster import has_gpus
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.sweep.damaged import check_own, discard_damaged
from rayft.flow.sweep.identity import (
    IDENTITY_FILE,
    begun_by,
    check_identity,
    not_used,
    sweep_id,
    write_identity,
)
from rayft.identity import Identity
from rayft.methods.base import LayerShape
from rayft.models.files import cache_folder
from rayft.models.load import ModelConfig, context_length, load_encoder, load_skeleton
from rayft.models.methods import method
from rayft.models.targets import check_pattern, linear_shapes, select
from rayft.paths import PathText, check_folder, reason
from rayft.sweep.schedule import EVENTS_FILE
from rayft.sweep.space import Point, check_executor, points
from rayft.tracking.base import TrackerSpec, tracker_spec
from rayft.tracking.connection import check as check_tracker
from rayft.tracking.mlflow import prepare
from rayft.train.context import check_task, trial_folder
from rayft.train.identity import identify
from rayft.train.links import spans
from rayft.train.run import RunConfig

__all__ = ["WRITTEN", "Plan", "former_hash", "is_sweep", "preflight", "skeleton", "stamp_line", "sweep_hash"]

STAMP_FILE = "config.yaml"
CHECKED = 200
"""Examples of a part whose own answers are scored before the start."""
WRITTEN = (
    STAMP_FILE, IDENTITY_FILE, EVENTS_FILE, "analysed", "analysis.json", "deploy.yaml", "plots", "ray",
    "report.html", "scores", "serve.yaml", "squeezed", "sweep.json", "trials", "winner",
)  # fmt: skip
"""What a sweep writes into its folder, beside the tracker's files."""
ELSEWHERE = ("output", "question", "serve", "tracking", "promote", "squeeze", "analyze")
"""Settings that say where results go and what becomes of them, and change no trial."""
HOW = {
    "sweep": ("lanes", "restarts", "silence_seconds", "hang_seconds"),
    "evaluate": ("checkpoint_seconds",),
}
"""Settings that say how trials are run, and change no result: they may differ when a sweep continues."""
SHOWN = 3
"""Changed settings that a message names."""
CHECKPOINT = 16
"""Bytes of a checkpoint for each number that trains: the weight, its fp32 master and two moments."""
MARGIN = 2**30
"""Bytes left free beside what the sweep writes."""
SCRATCH = 2**28
"""Bytes that must be free in other folders that a sweep writes to: Ray's logs, temporary files, caches."""
RAY_FULL = 0.95
"""Ray moves no objects to a disk that is fuller than this share."""


@dataclass(frozen=True)
class Plan:
    """A sweep that passed its checks."""

    config: PipelineConfig
    run: RunConfig
    points: list[Point]
    executor: Literal["lane", "isolated"]
    tracker: TrackerSpec
    parts: Parts
    output: Path
    identity: Identity
    """Of data and base."""
    former_hash: str
    """What rayft 0.1.0 knew the sweep by, if it began it; else empty."""
    warnings: tuple[str, ...] = ()
    """What a person should know before the sweep starts."""


def preflight(config: PipelineConfig) -> Plan:
    """Check a sweep as far as it can be without Ray, and make its output folder.

    Raises:
        RayftError: ours, with what to do; nothing has been started or overwritten.
    """
    output = config.folder
    check_folder(output, "output (--set output=…)")
    spec = tracker_spec(config.tracking, output)
    check_tracker(spec)
    run = config.run(has_gpus())
    trials = points(config.sweep, run)
    executor = check_executor(config.sweep, run)
    _check_devices(run)
    shapes, encoder, context = skeleton(run.model)
    written = _check_ranks(trials, shapes, config.sweep.lanes)
    beside = _copies(config, trials, shapes)
    parts = read(config.data)
    check_task(run, parts)
    for name in ("train", "val", "test"):
        encoded = encode_all(
            getattr(parts, name), encoder, config.data.max_length, context=context, part=name
        )
        if name == "train":
            _check_links(trials, encoded)
    begun = _check_stamp(config, output)
    trials = _known_keys(trials, begun, output)
    identity = check_identity(output, identify(run, parts), run.model)
    identity = identity.model_copy(update={"sweep": sweep_id(output, identity)})
    unused = not_used(output, trials)
    _make_output(config, output, identity, keep=begun is not None)
    damaged = discard_damaged(output, trials)
    _check_disk(output, written, beside)
    full = _check_other_disks(output)
    tracker = prepare(spec)
    warnings = (*_doubts(run, parts, encoder), *unused, *damaged, *full)
    former = "" if begun_by(output) else former_hash(begun or config)
    return Plan(config, run, trials, executor, tracker, parts, output, identity, former, warnings)


def _doubts(run: RunConfig, parts: Parts, encoder: Any) -> tuple[str, ...]:
    """Find what would make a model that has learnt perfectly look as if it had not."""
    if run.model.task != "causal_lm" or not parts.test[0].messages:
        return ()
    found = []
    if problem := ChatFormat.of(encoder).problem:
        found.append(
            f"{problem}, so a trained model may not stop after its answer; use a tokenizer whose chat "
            "template ends each answer with a token, such as its eos_token"
        )
    limit = run.evaluate.max_new_tokens
    for name, part in (("val", parts.val), ("test", parts.test)):
        perfect = perfect_answers(part[:CHECKED], encoder, parts.scorer)
        long = [answer.tokens for answer in perfect if answer.tokens > limit]
        if long:
            found.append(
                f"{len(long)} of {len(perfect)} answers of {name} are longer than evaluate.max_new_tokens = "
                f"{limit}, so no model can give them; the longest has {max(long)} tokens"
            )
        refused = [example for example, answer in zip(part, perfect, strict=False) if answer.score < 1]
        if refused:
            found.append(
                f"{len(refused)} of {len(perfect)} answers of {name} would not be scored as right if a model "
                f"gave exactly them, such as {refused[0].answer[:60]!r}"
            )
    return tuple(found)


def skeleton(config: ModelConfig) -> tuple[dict[str, tuple[int, int]], Any, int]:
    """Give a model's linear layers, what makes its inputs, and its context, without loading its weights.

    Raises:
        ModelError: if it can't be found.
    """
    model = load_skeleton(config)
    encoder = load_encoder(config, model.config)
    return linear_shapes(model), encoder, context_length(config, model.config, encoder)


def _check_ranks(trials: list[Point], shapes: dict[str, tuple[int, int]], lanes: int) -> int:
    """Check each method's targets and ranks; return the most bytes that the trials keep at once."""
    stored: dict[str, int] = {}
    for config in {content_hash(point.run.method): point.run.method for point in trials}.values():
        kind = method(config.name)
        size = 0
        # The tightest layer first, so that the message names a rank that all of them can hold.
        chosen = select(shapes, config.targets)
        check_pattern(config, chosen)
        for name in sorted(chosen, key=lambda name: kind.max_rank(LayerShape(*shapes[name]))):
            shape = LayerShape(*shapes[name])
            rank = config.of(name).rank
            kind.check(shape, rank, name, config.links)
            size += kind.stored(shape, rank, config.links)
        stored[content_hash(config)] = size
    kept = sum(stored[content_hash(point.run.method)] * _bytes_of_a_number(point.run) for point in trials)
    # A trial that has ended keeps one checkpoint; one that trains keeps two, and writes a third beside them.
    return kept + lanes * 2 * CHECKPOINT * max(stored.values())


def _bytes_of_a_number(run: RunConfig) -> int:
    """Give the bytes that a trial writes for each number that it stores."""
    # The adapter in 4 bytes, and a checkpoint.
    kept = run.evaluate.trail and not method(run.method.name).saves_model
    trail = run.optim.steps // (run.evaluate.every or run.optim.steps) if kept else 0
    return 4 * (1 + trail) + CHECKPOINT


def _copies(config: PipelineConfig, trials: list[Point], shapes: dict[str, tuple[int, int]]) -> int:
    """Return the bytes that a sweep writes beside its trials: whole models, squeezed and tracked adapters."""
    whole = [point for point in trials if method(point.run.method.name).saves_model]
    total = 0
    if whole:
        parameters = load_skeleton(config.model).parameters()
        total = 4 * len(whole) * sum(parameter.numel() for parameter in parameters)
    ranks = [point.run.method for point in trials if method(point.run.method.name).exports_lora]
    largest = max(
        (
            sum(method(one.name).stored(LayerShape(*shapes[n]), one.of(n).rank, one.links) for n in chosen)
            for one in ranks
            for chosen in [select(shapes, one.targets)]
        ),
        default=0,
    )
    squeeze = config.squeeze
    targets = len(squeeze.ranks) + (squeeze.energy is not None) + (squeeze.budget is not None)
    made = squeeze.winners * (1 + targets * (2 if squeeze.cont else 1))
    continued = CHECKPOINT * largest * squeeze.winners * targets if squeeze.cont else 0
    # MLflow's artifacts hold another copy of each trial's adapter, of each squeezed one, and of the winner.
    return total + 4 * largest * (len(ranks) + 2 * made + 1) + continued


def _check_links(trials: list[Point], train: list[AnyEncoded]) -> None:
    """Check that each chain by epochs has steps for all its links."""
    for run in (point.run for point in trials):
        chain = run.method.chain
        if chain is not None and chain.epochs is not None:
            rows = run.optim.rows_per_step
            spans(run, Schedule(train, run.data.max_length, rows, run.seed, packing=run.data.packing))


def _check_devices(run: RunConfig) -> None:
    gpus = has_gpus()
    if run.scale.device == "cuda" and not (torch.cuda.is_available() if gpus is None else gpus):
        raise ResourceError(
            "scale.device is cuda, but no GPU is here; set scale.device: cpu or auto. A cluster whose GPU "
            "nodes are still to come says so by a resource gpu_cluster on its head"
        )


def _check_stamp(config: PipelineConfig, output: Path) -> PipelineConfig | None:
    """Let a sweep go on in its own folder, and in no other's.

    Returns:
        The configuration that rayft 0.1.0 began it with, whose hashes counted all of `HOW` too; None for a
        sweep of a later version, and for one that is still to begin.
    """
    stamp, begun = output / STAMP_FILE, None
    if not is_sweep(output):
        others = sorted(name for name in WRITTEN if os.path.lexists(output / name))
        if "trials" in others and {IDENTITY_FILE, "sweep.json"} & {*others}:
            raise ConfigError(
                f"{stamp} is missing or damaged: its first line does not name a sweep, so the results beside "
                "it can't be told from another sweep's. Nothing was touched. Put back a copy of it; or, if "
                f"they are of this very configuration, write '{stamp_line(config).strip()}' into its first "
                "line; or choose another folder with --set output=…"
            )
        if others:
            raise ConfigError(
                f"{output} holds {', '.join(others)}, which no sweep of rayft's wrote and this one would "
                "replace; choose another folder with --set output=…"
            )
    elif not stamp.read_text(encoding="utf-8", errors="replace").startswith(stamp_line(config)):
        begun = _begun_by_0_1_0(stamp)
        if begun is None or sweep_hash(begun) != sweep_hash(config):
            raise ConfigError(_other_sweep(config, output))
    check_own(output)
    return begun


def _begun_by_0_1_0(stamp: Path) -> PipelineConfig | None:
    """Return the configuration in a stamp of rayft 0.1.0, None if another version wrote it."""
    try:
        before = load_config(stamp)
    except ConfigError:
        return None
    first = stamp.read_text(encoding="utf-8").partition("\n")[0]
    return before if first == f"# sweep {former_hash(before)}" else None


def _known_keys(trials: list[Point], begun: PipelineConfig | None, output: Path) -> list[Point]:
    """Give trials that rayft 0.1.0 has begun the keys that it knew them by."""
    if begun is None:
        return trials
    seconds = {"checkpoint_seconds": begun.evaluate.checkpoint_seconds}
    found = []
    for point in trials:
        then = point.run.model_copy(update={"evaluate": point.run.evaluate.model_copy(update=seconds)})
        key = f"{point.name}-{content_hash(then)[:6]}"
        found.append(replace(point, key=key) if trial_folder(output, key).is_dir() else point)
    return found


def _other_sweep(config: PipelineConfig, output: Path) -> str:
    """Return why a sweep can't continue in a folder whose configuration has another hash."""
    stamp = output / STAMP_FILE
    otherwise = "Nothing of it was touched. Choose another folder with --set output=…, or delete that one"
    try:
        before = load_config(stamp)
    except ConfigError as error:
        return (
            f"{output} holds a sweep whose configuration ({stamp}) this version of rayft can't read: {error}."
            f" {otherwise}"
        )
    if sweep_hash(before) == sweep_hash(config):
        return (
            f"{output} holds this sweep as an earlier version of rayft made it, which identified trials "
            "otherwise. It can be read as it is (rayft report, serve, squeeze, analyze), but not continued. "
            f"{otherwise}"
        )
    old, new = leaves(before), leaves(config)
    changed = [
        f"{name} was {old.get(name, 'not set')}, now {new.get(name, 'not set')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and name.partition(".")[0] not in ELSEWHERE
        and name.partition(".")[2] not in HOW.get(name.partition(".")[0], ())
    ]
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return (
        f"{output} holds a sweep with another configuration ({stamp}): {'; '.join(changed[:SHOWN])}{more}. "
        f"{otherwise}"
    )


def _make_output(config: PipelineConfig, output: Path, identity: Identity, *, keep: bool) -> None:
    """Make a sweep's folder, and record there what the sweep follows from.

    Args:
        config: the sweep's.
        output: its folder.
        identity: of its data and base.
        keep: whether the configuration that is recorded there stays: its trials' keys follow from it.
    """
    stamp = output / STAMP_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not keep:
            write_file(stamp, stamp_line(config) + config.model_dump_json(indent=2) + "\n")
        write_identity(output, identity)
    except DiskFullError:
        raise
    except OSError as error:
        raise ResourceError(
            f"can't write to {output} ({reason(error, stamp)}); choose another with --set output=…"
        ) from error


def is_sweep(folder: Path) -> bool:
    """Return whether a sweep wrote to a folder."""
    stamp = folder / STAMP_FILE
    return stamp.is_file() and stamp.read_text(errors="replace", encoding="utf-8").startswith("# sweep ")


def stamp_line(config: PipelineConfig) -> str:
    """Return the first line of the configuration that a sweep keeps in its folder."""
    return f"# sweep {sweep_hash(config)}\n"


def sweep_hash(config: PipelineConfig) -> str:
    """Identify what is trained: the sections that decide results, not where they go or how trials are run."""
    return _hash(config, HOW)


def former_hash(config: PipelineConfig) -> str:
    """Return the hash by which rayft 0.1.0 identified a sweep, which counted `HOW` too."""
    return _hash(config, {})


def _hash(config: PipelineConfig, left_out: Mapping[str, tuple[str, ...]]) -> str:
    fields = PipelineConfig.model_fields
    same: dict[str, Any] = {
        name: "" if fields[name].annotation in (str, PathText | None) else fields[name].default
        for name in ELSEWHERE
    }
    for name, settings in left_out.items():
        section = getattr(config, name)
        defaults = {setting: type(section).model_fields[setting].default for setting in settings}
        same[name] = section.model_copy(update=defaults)
    return content_hash(config.model_copy(update=same))


def _check_disk(output: Path, written: int, beside: int) -> None:
    """Refuse an output folder without room for what the sweep writes there.

    Args:
        output: the folder.
        written: bytes of the trials' adapters, trails and checkpoints.
        beside: bytes of whole models, and of squeezed and tracked adapters.
    """
    free, needed = shutil.disk_usage(output).free, written + beside
    if free < needed + MARGIN:
        raise DiskFullError(
            f"the sweep may write {_gib(needed)} below {output} ({_gib(written)} of adapters and "
            f"checkpoints, {_gib(beside)} of whole models, squeezed and tracked adapters), but only "
            f"{_gib(free)} are free, of which {_gib(MARGIN)} must stay; free some, or choose another folder "
            "with --set output=…"
        )


def _check_other_disks(output: Path) -> tuple[str, ...]:
    """Refuse other folders that a sweep writes to without room; return a warning where Ray has little."""
    ray_folder = Path(get_default_ray_temp_dir())
    places = {
        "TMPDIR": Path(tempfile.gettempdir()),
        "RAYFT_CACHE": cache_folder(),
        # The session of a cluster that is joined lies where whoever started it put it.
        **({} if ray.is_initialized() else {"RAY_TMPDIR": ray_folder}),
    }
    for setting, folder in places.items():
        there = _existing(folder)
        free = shutil.disk_usage(there).free
        if os.stat(there).st_dev != os.stat(output).st_dev and free < SCRATCH:
            raise DiskFullError(
                f"a sweep writes to {folder} too, whose disk has only {free / 2**20:.0f} MiB free, and "
                f"{SCRATCH // 2**20} MiB are needed; free some, or set {setting} to another folder"
            )
    usage = shutil.disk_usage(_existing(ray_folder))
    if "RAY_TMPDIR" in places and usage.free < (1 - RAY_FULL) * usage.total:
        return (
            f"the disk of {ray_folder} is more than {RAY_FULL:.0%} full, so Ray can't move objects from "
            "memory to it; free some, or set RAY_TMPDIR to a folder on another disk",
        )
    return ()


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"

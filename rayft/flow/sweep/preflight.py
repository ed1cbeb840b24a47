"""Check everything about a sweep that can be checked without workers, and return its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rayft.artifacts import AdapterArtifact
from rayft.config import content_hash
from rayft.data.chat_format import ChatFormat
from rayft.data.loader import RowStream
from rayft.data.pack import AnyEncoded
from rayft.data.prepared import prepare
from rayft.data.source import PARTS, Parts
from rayft.data.texts import notes
from rayft.errors import ConfigError, ResourceError
from rayft.evaluate.tasks import check_questions, perfect_answers
from rayft.flow.cluster import has_gpus
from rayft.flow.config import PipelineConfig
from rayft.flow.squeeze.checks import check_base
from rayft.flow.sweep.disk import check_disk, check_other_disks, derived_bytes, trial_bytes
from rayft.flow.sweep.folder import (
    check_stamp,
    discard_damaged,
    former_hash,
    known_keys,
    make_folder,
)
from rayft.flow.sweep.identity import begun_by, check_identity, not_used, sweep_id
from rayft.identity import Identity
from rayft.methods.base import LayerShape
from rayft.models.attention import check_packing
from rayft.models.files import cache_folder
from rayft.models.load import ModelConfig, context_length, load_encoder, load_skeleton
from rayft.models.methods import method
from rayft.models.targets import check_pattern, linear_shapes, select
from rayft.paths import check_folder
from rayft.sweep.executor import MOST_SLOTS
from rayft.sweep.space import Point, check_distinct, check_executor, check_slots, points
from rayft.tracking.base import TrackerSpec, tracker_spec
from rayft.tracking.connection import check as check_tracker
from rayft.tracking.mlflow import prepare as prepare_tracker
from rayft.train.deepspeed import check_settings
from rayft.train.identity import identify
from rayft.train.phases import link_steps
from rayft.train.run import RunConfig
from rayft.train.session import check_task
from rayft.train.trainer import check_start

__all__ = ["Plan", "described", "preflight"]

CHECKED = 200
"""How many examples of a part have their own answers scored before the sweep starts."""


@dataclass(frozen=True)
class Plan:
    """A sweep that has passed all checks."""

    config: PipelineConfig
    run: RunConfig
    """What all trials share."""
    points: list[Point]
    """The trials."""
    executor: Literal["lane", "isolated"]
    slots: int | None
    """The most trials that share a lane's steps; None if the lanes find out how many are fastest."""
    tracker: TrackerSpec
    parts: Parts
    """The data."""
    output: Path
    """The sweep's folder, which exists."""
    identity: Identity
    """Identity of data and base."""
    former_hash: str
    """The hash by which rayft 0.1.0 identified the sweep, if that version started it; otherwise empty."""
    warnings: tuple[str, ...] = ()
    """What a person should know before the sweep starts."""


def preflight(config: PipelineConfig) -> Plan:
    """Check a sweep as far as possible without workers, and make its output folder.

    Raises:
        RayftError: with what to do about it. Nothing has been started or overwritten then.
    """
    output = config.folder
    check_folder(output, "output (--set output=…)")
    spec = tracker_spec(config.tracking, output)
    check_tracker(spec)
    begun = check_stamp(config, output)
    run = config.run(has_gpus())
    trials = points(config.sweep, run)
    check_distinct(trials)
    executor = check_executor(config.sweep, run)
    base = load_skeleton(run.model)
    slots, turns = check_slots(config.sweep, trials, base)
    _check_run(run, base)
    shapes, encoder, context = described(run.model, base)
    _check_ranks(trials, shapes)
    start = _check_start(trials, run, shapes)
    prepared = prepare(config.data, encoder, cache_folder())
    parts = prepared.parts
    check_task(run, parts)
    if config.sweep.select_by == "val_score" and not parts.asks:
        raise ConfigError(
            "sweep.select_by is val_score, but raw text has no answers to score; set it to val_loss"
        )
    encoded = {part: prepared.encoded(part, context) for part in PARTS}
    _check_links(trials, encoded["train"])
    if run.model.task == "causal_lm" and parts.asks:
        # Texts to train on are dropped or cut if they are too long; questions are asked as they are.
        check_questions({"val": parts.val, "test": parts.test}, encoder, context, run.evaluate.max_new_tokens)
    trials = known_keys(trials, begun, output)
    now = identify(run, parts).model_copy(update={"start": start, "start_name": run.start or ""})
    identity = check_identity(output, now, run.model)
    identity = identity.model_copy(update={"sweep": sweep_id(output, identity)})
    unused = not_used(output, trials)
    make_folder(config, output, identity, keep=begun is not None)
    damaged = discard_damaged(output, trials)
    busy = trial_bytes(trials, shapes, config.sweep.lanes, slots or MOST_SLOTS)
    check_disk(output, busy, derived_bytes(config, trials, shapes))
    full = check_other_disks(output)
    tracker = prepare_tracker(spec)
    warnings = (*turns, *notes(encoded), *_doubts(run, parts, encoder), *unused, *damaged, *full)
    former = "" if begun_by(output) else former_hash(begun or config)
    return Plan(config, run, trials, executor, slots, tracker, parts, output, identity, former, warnings)


def _doubts(run: RunConfig, parts: Parts, encoder: Any) -> tuple[str, ...]:
    """Return a warning for each setting because of which a perfect model could not reach a perfect score."""
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
    if parts.scorer.failures:
        found.append(
            f"the scorer raised an error for {parts.scorer.failures} of these answers, which then score 0; "
            f"the first: {parts.scorer.problem}"
        )
    return tuple(found)


def described(config: ModelConfig, model: Any) -> tuple[dict[str, tuple[int, int]], Any, int]:
    """Return a model's linear layers (name → outputs, inputs), what encodes its inputs, and its context.

    Args:
        config: says which model it is.
        model: its skeleton.

    Raises:
        ModelError: if what encodes its inputs can't be found.
    """
    encoder = load_encoder(config, model.config)
    return linear_shapes(model), encoder, context_length(config, model.config, encoder)


def _check_ranks(trials: Sequence[Point], shapes: dict[str, tuple[int, int]]) -> None:
    """Check the targets and ranks of each method."""
    for config in {content_hash(point.run.method): point.run.method for point in trials}.values():
        kind = method(config.name)
        # The layer with the least room comes first, so that the message names a rank that fits all layers.
        chosen = select(shapes, config.targets)
        check_pattern(config, chosen)
        for name in sorted(chosen, key=lambda name: kind.max_rank(LayerShape(*shapes[name]))):
            kind.check(LayerShape(*shapes[name]), config.of(name).rank, name, config.links)


def _check_start(trials: Sequence[Point], run: RunConfig, shapes: dict[str, tuple[int, int]]) -> str:
    """Check that the adapter which all trials start from fits them and the base; return its content hash.

    Without such an adapter the hash is empty.
    """
    if run.start is None:
        return ""
    artifact = AdapterArtifact.load(run.start)
    check_base(artifact, None, run)
    for point in trials:
        check_start(point.run, artifact, shapes)
        if point.run.method.rank != artifact.rank:
            raise ConfigError(
                f"start: {run.start} has rank {artifact.rank}, and {point.name} trains at rank "
                f"{point.run.method.rank}; set its rank to {artifact.rank}"
            )
    return artifact.content_hash


def _check_links(trials: Sequence[Point], train: Sequence[AnyEncoded]) -> None:
    """Check that each chain whose links are counted in epochs has steps for all of its links."""
    for run in (point.run for point in trials):
        chain = run.method.chain
        if chain is not None and chain.epochs is not None:
            rows = run.optim.rows_per_step
            link_steps(run, RowStream(train, run.data.max_length, rows, run.seed, packing=run.data.packing))


def _check_run(run: RunConfig, base: Any) -> None:
    """Check the settings that all trials share, except those of the data."""
    gpus = has_gpus()
    if run.scale.device == "cuda" and not (torch.cuda.is_available() if gpus is None else gpus):
        raise ResourceError(
            "scale.device is cuda, but no GPU is here; set scale.device: cpu or auto. A cluster whose GPU "
            "nodes start later declares them by a resource gpu_cluster on its head"
        )
    check_settings(run)
    if run.data.packing and run.model.task == "causal_lm":
        check_packing(base, run.data.max_length)

"""Every check that needs no cluster, before one starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rayft.config import content_hash
from rayft.data.source import Parts, read
from rayft.data.template import encode_all
from rayft.errors import ConfigError, ModelError, ResourceError
from rayft.flow.cluster import has_gpus
from rayft.flow.config import PipelineConfig
from rayft.methods import method
from rayft.methods.base import LayerShape
from rayft.models.load import ModelConfig, resolve
from rayft.models.targets import linear_shapes, select
from rayft.sweep.space import Point, check_executor, points
from rayft.tracking.base import TrackerSpec, tracker_spec
from rayft.tracking.mlflow import prepare
from rayft.train.context import check_task
from rayft.train.run import RunConfig

__all__ = ["Plan", "preflight", "skeleton", "sweep_hash"]

STAMP_FILE = "config.yaml"
MARGIN = 2**30
"""Bytes left free beside what the sweep writes."""


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


def preflight(config: PipelineConfig) -> Plan:
    """Check a sweep as far as it can be without Ray, and make its output folder.

    Raises:
        RayftError: ours, with what to do; nothing has been started or overwritten.
    """
    run = config.run(has_gpus())
    trials = points(config.sweep, run)
    executor = check_executor(config.sweep, run)
    _check_devices(run)
    shapes, tokenizer, context = skeleton(run.model)
    update = _check_ranks(trials, shapes)
    parts = read(config.data)
    check_task(run, parts)
    for name in ("train", "val", "test"):
        encode_all(getattr(parts, name), tokenizer, config.data.max_length, context=context, part=name)
    output = Path(config.output).absolute()
    _check_output(config, output)
    _check_disk(output, len(trials) * update)
    tracker = prepare(tracker_spec(config.tracking, output))
    return Plan(config, run, trials, executor, tracker, parts, output)


def skeleton(config: ModelConfig) -> tuple[dict[str, tuple[int, int]], Any, int]:
    """Give a model's linear layers, tokenizer and context without loading its weights.

    Raises:
        ModelError: if it can't be found.
    """
    import transformers

    source = resolve(config)
    sequence = config.task == "sequence_classification"
    auto: Any = (
        transformers.AutoModelForSequenceClassification if sequence else transformers.AutoModelForCausalLM
    )
    try:
        settings = transformers.AutoConfig.from_pretrained(source, revision=config.revision)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=config.revision)
        with torch.device("meta"):
            model = auto.from_config(settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"can't read the model {config.name}: {error}. Without a hub, give a local folder, a .gguf file "
            "or a registered name"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return linear_shapes(model), tokenizer, int(getattr(settings, "max_position_embeddings", 0) or 1_000_000)


def _check_ranks(trials: list[Point], shapes: dict[str, tuple[int, int]]) -> int:
    """Check each method's targets and ranks; give the bytes that the largest trial writes."""
    largest = 0
    for config in {point.run.method for point in trials}:
        kind = method(config.name)
        size = 0
        # The tightest layer first, so that the message names a rank that all of them can hold.
        chosen = select(shapes, config.targets)
        for name in sorted(chosen, key=lambda name: kind.max_rank(LayerShape(*shapes[name]))):
            shape = LayerShape(*shapes[name])
            kind.check(shape, config.rank, name)
            size += kind.trained(shape, config.rank)
        # Adapter in 4 bytes; checkpoint with fp32 master and two moments beside the weights.
        largest = max(largest, size * (4 + 16))
    return largest


def _check_devices(run: RunConfig) -> None:
    gpus = has_gpus()
    if run.scale.device == "cuda" and not (torch.cuda.is_available() if gpus is None else gpus):
        raise ResourceError(
            "scale.device is cuda, but no GPU is here; set scale.device: cpu or auto. A cluster whose GPU "
            "nodes are still to come says so by a resource gpu_cluster on its head"
        )


def _check_output(config: PipelineConfig, output: Path) -> None:
    """Let a sweep go on in its own folder, and in no other's."""
    stamp = output / STAMP_FILE
    mark = f"# sweep {sweep_hash(config)}\n"
    if stamp.is_file() and not stamp.read_text().startswith(mark):
        raise ConfigError(
            f"{output} holds a sweep with another configuration ({stamp}); nothing of it was touched. Choose "
            "another folder with --set output=…, or delete that one"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        stamp.write_text(mark + config.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise ResourceError(
            f"can't write to {output} ({error}); choose another with --set output=…"
        ) from error


def sweep_hash(config: PipelineConfig) -> str:
    """Identify what is trained: the sections that decide results, not where they go."""
    same = {"output": "", "serve": PipelineConfig.model_fields["serve"].default, "question": ""}
    same |= {name: PipelineConfig.model_fields[name].default for name in ("tracking", "promote", "squeeze")}
    return content_hash(config.model_copy(update=same))


def _check_disk(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output).free
    if free < needed + MARGIN:
        raise ResourceError(
            f"the sweep may write {needed / 2**30:.1f} GiB below {output}, but only {free / 2**30:.1f} GiB "
            "are free (1 GiB must stay); free some, or choose another folder with --set output=…"
        )

"""What `rayft eval` was asked for, checked, and the configuration that it is evaluated with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rayft.config import Section, parse
from rayft.errors import ConfigError
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.sweep.folder import STAMP_FILE, sweep_above
from rayft.models.load import ModelConfig
from rayft.tracking.base import TrackerSpec, TrackingConfig, tracker_spec
from rayft.train.run import EvaluateConfig, ScaleConfig

__all__ = ["EvaluateRequest", "Known", "TaskSettings", "check_request", "known"]


@dataclass(frozen=True)
class EvaluateRequest:
    """A request to evaluate one target, or to compare two."""

    targets: tuple[str, ...]
    """Folders of adapters or models, names of models, `models:/…`; an adapter's rank may follow (`@r4`). With
    `url`, names that it serves."""
    config: str | Path | PipelineConfig | None = None
    """Configuration that names base and data, or its file; that of the targets' sweep if not given."""
    overrides: tuple[str, ...] = ()
    """Settings of the configuration's file."""
    part: Literal["val", "test"] = "test"
    rank: int | None = None
    """Rank of the prefix of squeezed adapters that is evaluated, where a target names none; None for the
    whole adapters."""
    samples: int | None = None
    """Number of questions, from the first; of each task, if there are tasks. None for all."""
    tasks: tuple[str, ...] = ()
    """Names of tasks, groups or tags of lm-evaluation-harness, which take the place of the data."""
    include: Path | None = None
    """Folder with further tasks."""
    url: str | None = None
    """URL of an OpenAI-compatible server that serves the targets, up to `/v1`."""
    base: str | None = None
    """The base, instead of the configuration's or the adapter's; with `url`, of which the tokenizer is
    used."""
    uri: str | None = None
    """MLflow, for `models:/…` and for tracking."""
    out: Path | None = None
    """JSON file for the result."""
    overwrite: bool = False
    """Whether an earlier evaluation in `out` is replaced."""


class TaskSettings(Section):
    """The sections of a configuration that tasks of lm-evaluation-harness need; they bring their own data."""

    model: ModelConfig = ModelConfig()
    scale: ScaleConfig = ScaleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()


@dataclass(frozen=True)
class Known:
    """The configuration of an evaluation, and where it comes from."""

    settings: PipelineConfig | TaskSettings
    names_base: bool
    """Whether the user or a sweep has named the base."""
    sweep: Path | None
    """Folder of the sweep that the settings are those of; None if they are from elsewhere."""
    place: TrackerSpec
    """Where registered adapters are, and where the evaluation is tracked if `tracked`."""
    tracked: bool


def check_request(request: EvaluateRequest) -> None:
    """Check the options of a request that can be checked alone.

    Raises:
        ConfigError: naming the option, and what to write instead.
    """
    if len(request.targets) not in (1, 2):
        raise ConfigError(f"there are {len(request.targets)} targets: give one, or two to compare")
    if request.part not in ("val", "test"):
        raise ConfigError(f"--part {request.part}: write val or test")
    for name, value in (("--rank", request.rank), ("--samples", request.samples)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: write 1 or more, or leave it out")
    if request.url is not None and request.rank is not None:
        raise ConfigError(f"--rank is for folders; at a server write {request.targets[0]}@r{request.rank}")
    if not request.tasks:
        for name in ("url", "include"):
            if getattr(request, name) is not None:
                raise ConfigError(f"--{name} is for tasks of lm-evaluation-harness: name some with --task")
    if request.overrides and isinstance(request.config, PipelineConfig):
        raise ConfigError("overrides are for a configuration in a file: change the configuration itself")


def known(request: EvaluateRequest) -> Known:
    """Return the configuration of an evaluation.

    Raises:
        ConfigError: if it is wrong, or no configuration names the data that is needed.
        TrackingError: if the URI of MLflow is wrong.
    """
    folders = [] if request.url else [Path(text) for text in request.targets if Path(text).is_dir()]
    sweep = next((found for folder in folders if (found := sweep_above(folder)) is not None), None)
    if request.config is not None:
        sweep = None
    settings = _settings(request, sweep)
    if request.base is not None:
        # `model_copy` counts the name as set.
        model = settings.model.model_copy(update={"name": request.base})
        settings = settings.model_copy(update={"model": model})
    names_base = isinstance(settings, PipelineConfig) or "name" in settings.model.model_fields_set
    tracking = settings.tracking
    if request.uri is not None:
        tracking = tracking.model_copy(update={"uri": request.uri})
    # Where the configuration's sweep has registered its winner, if that has run.
    own = settings.folder if isinstance(settings, PipelineConfig) and settings.folder.is_dir() else None
    tracked = bool(sweep or own or tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"))
    place = tracker_spec(tracking, sweep or own or Path.cwd())
    return Known(settings, names_base, sweep, place, tracked)


def _settings(request: EvaluateRequest, sweep: Path | None) -> PipelineConfig | TaskSettings:
    if isinstance(request.config, PipelineConfig):
        return request.config
    if request.config is not None:
        return load_config(request.config, request.overrides)
    if sweep is not None:
        return load_config(sweep / STAMP_FILE, request.overrides)
    if request.tasks:
        return parse(TaskSettings, {}, request.overrides)
    raise ConfigError(
        f"{request.targets[0]} lies in no folder of a sweep, so the data to score it on is not known: give a "
        "configuration that names base and data with --config, or tasks of lm-evaluation-harness with --task"
    )

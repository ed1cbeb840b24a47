"""What `rayft eval` was asked for, checked, and the configuration that it is evaluated with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rayft.config import Section, leaves, parse
from rayft.errors import ConfigError
from rayft.flow.config import TrainConfig, load_train_config
from rayft.flow.sweep.folder import STAMP_FILE, sweep_above
from rayft.flow.target import Target, base_among, split_rank
from rayft.models.base import base_of, pinned
from rayft.models.load import ModelConfig
from rayft.paths import checked_text, read_path
from rayft.tracking.base import TrackerSpec, TrackingConfig, tracker_spec
from rayft.train.run import EvaluateConfig, ScaleConfig

__all__ = [
    "EvaluateRequest",
    "Known",
    "TaskSettings",
    "check_request",
    "chosen",
    "known",
    "models_of",
    "scored_settings",
    "sweeps_of",
]

_HERE = ("model", "scale.device", "scale.dtype", "scale.threads", "evaluate.batch_size")
READ = {
    "on your data": ("data", *_HERE, "evaluate.max_new_tokens"),
    "on tasks in this process": _HERE,
    "on tasks through a server": ("model.name", "model.revision", "evaluate.batch_size"),
}
"""Kind of an evaluation → the settings and sections that decide its scores."""
WHERE = ("name", "output", "tracking")
"""Settings that decide where an evaluation is tracked."""


@dataclass(frozen=True)
class EvaluateRequest:
    """A request to evaluate one target, or to compare two."""

    targets: tuple[str, ...]
    """As `rayft.flow.target.find_target`; with `url`, names that the server serves."""
    config: str | Path | TrainConfig | None = None
    """Configuration that names base and data, or its file; that of the targets' sweep if not given."""
    overrides: tuple[str, ...] = ()
    """Settings of the configuration, such as `evaluate.max_new_tokens=64`."""
    part: Literal["val", "test"] | None = None
    """Part of the data; `test` if not given."""
    rank: int | None = None
    """Rank of the adapters whose names have none; None for the whole adapters."""
    samples: int | None = None
    """Number of questions, from the first; of each task, if there are tasks. None for all."""
    tasks: tuple[str, ...] = ()
    """Names of tasks, groups or tags of lm-evaluation-harness, which take the place of the data."""
    chat_template: bool = False
    """Whether the questions of tasks are asked in the model's chat template."""
    system: str | None = None
    """System message at the beginning of each question of a task."""
    one_turn: bool = False
    """Whether the solved examples of a task are in one turn with the question, and not in turns of their
    own."""
    include: Path | None = None
    """Folder with further tasks."""
    url: str | None = None
    """URL of an OpenAI-compatible server that serves the targets, up to `/v1`."""
    base: str | None = None
    """The base, instead of the configuration's or the adapter's; with `url`, its tokenizer is used."""
    uri: str | None = None
    """MLflow, for `models:/…` and for tracking."""
    out: Path | None = None
    """JSON file for the result."""
    overwrite: bool = False
    """Whether an earlier evaluation in `out` is replaced."""

    @property
    def kind(self) -> str:
        """Which kind of evaluation it is, a key of `READ`."""
        if not self.tasks:
            return "on your data"
        return "on tasks in this process" if self.url is None else "on tasks through a server"

    def sets(self, *settings: str) -> bool:
        """Return whether an override sets one of some settings: itself, its section, or a part of it."""
        keys = [override.partition("=")[0].strip() for override in self.overrides]
        return any(_below(key, one) or _below(one, key) for key in keys for one in settings)


class TaskSettings(Section):
    """The sections of a configuration that tasks of lm-evaluation-harness need; they bring their own data."""

    model: ModelConfig = ModelConfig()
    scale: ScaleConfig = ScaleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()


@dataclass(frozen=True)
class Known:
    """The configuration of an evaluation, and where it comes from."""

    settings: TrainConfig | TaskSettings
    names_base: bool
    """Whether the user or a sweep has named the base."""
    sweep: Path | None
    """Folder of the sweep whose data and base must be the present ones; None if there is none."""
    place: TrackerSpec
    """Where registered adapters are, and where the evaluation is tracked if `tracked`."""
    tracked: bool


def check_request(request: EvaluateRequest) -> None:
    """Check the options of a request that can be checked alone; none may do nothing.

    Raises:
        ConfigError: naming the option, and what to write instead.
    """
    texts = [("the target", text) for text in request.targets]
    for option, text in (*texts, ("--base", request.base), ("--uri", request.uri)):
        if text is not None:
            checked_text(text, option)
    if len(request.targets) not in (1, 2):
        raise ConfigError(f"there are {len(request.targets)} targets: give one, or two to compare")
    if request.part not in ("val", "test", None):
        raise ConfigError(f"--part {request.part}: write val or test")
    for name, value in (("--rank", request.rank), ("--samples", request.samples)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: write 1 or more, or leave it out")
    if request.url is not None and request.rank is not None:
        raise ConfigError(f"--rank is for folders; at a server write {request.targets[0]}@r{request.rank}")
    if request.overwrite and request.out is None:
        raise ConfigError("--overwrite is for the file of the result: name it with --out")
    _check_of_tasks(request)
    _check_overrides(request)


def _check_of_tasks(request: EvaluateRequest) -> None:
    """Refuse options of tasks on data, and those of data on tasks."""
    if request.tasks and request.part is not None:
        raise ConfigError(
            "--part is for your own data: each task of lm-evaluation-harness says which part it asks"
        )
    for name in ("url", "include", "chat_template", "system", "one_turn"):
        if getattr(request, name) not in (None, False) and not request.tasks:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is for tasks of lm-evaluation-harness: name some with --task")
    if request.system is not None and not request.system.strip():
        raise ConfigError("--system is empty: write a message, or leave it out")
    if request.one_turn and not request.chat_template:
        raise ConfigError(
            "--one-turn is for prompts in the chat template, which has turns: add --chat-template"
        )


def _check_overrides(request: EvaluateRequest) -> None:
    """Refuse overrides of settings that an evaluation does not read."""
    read = (*READ[request.kind], *WHERE)
    for override in request.overrides:
        # Reading the configuration says how an override is written.
        if "=" in override and not replace(request, overrides=(override,)).sets(*read):
            raise ConfigError(
                f"--set {override.partition('=')[0].strip()} changes nothing in an evaluation "
                f"{request.kind}, which reads {', '.join(read)}: leave it out"
            )


def _below(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def known(request: EvaluateRequest) -> Known:
    """Return the configuration of an evaluation.

    Raises:
        ConfigError: if it is wrong, or no configuration names the data that is needed.
        TrackingError: if the URI of MLflow is wrong.
    """
    sweep = next(iter(sweeps_of(request)), None) if request.config is None else None
    settings = _settings(request, sweep)
    if request.base is not None:
        settings = settings.model_copy(update={"model": _rebased(settings.model, request)})
    names_base = isinstance(settings, TrainConfig) or "name" in settings.model.model_fields_set
    tracking = settings.tracking
    if request.uri is not None:
        tracking = tracking.model_copy(update={"uri": request.uri})
    # Where the configuration's sweep has registered its winner, if that has run.
    own = settings.folder if isinstance(settings, TrainConfig) and settings.folder.is_dir() else None
    tracked = bool(sweep or own or tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"))
    place = tracker_spec(tracking, sweep or own or Path.cwd())
    # Data or base may be meant to be others than the sweep's.
    compared = None if request.base or request.sets("data", "model") else sweep
    return Known(settings, names_base, compared, place, tracked)


def models_of(targets: Sequence[Target], request: EvaluateRequest, about: Known) -> list[ModelConfig]:
    """Return for each target the model that it is, or its base.

    Args:
        targets: adapters or models.
        request: the request.
        about: the configuration.

    Raises:
        ConfigError: if a base is named and no target needs one, or one is needed and not named.
    """
    config, own = about.settings.model.located(), [target.model for target in targets if target.model]
    alone = len(own) == len(targets)
    named = "--base" if request.base is not None else "--set model.name"
    if alone and _named_base(request) and config.name not in own:
        raise ConfigError(f"{named} is for adapters, and {own[0]} is a model of its own: leave it out")
    found = []
    for target in targets:
        stored = base_of(target.adapter) if target.adapter else base_among(targets)
        name = target.model or (config.name if about.names_base else stored.name if stored else "")
        if not name:
            raise ConfigError(f"{target.name} names no base: name it with --base")
        # A revision is that of the base that it stands beside, or of the only models that there are.
        kept = name == config.name or not about.names_base or (alone and request.sets("model.revision"))
        revision = config.revision if kept else None
        base = config.model_copy(update={"name": name, "revision": revision})
        adapter = target.adapter or next((one.adapter for one in targets if one.adapter), None)
        found.append(base if target.model else pinned(base, adapter))
    return found


def _named_base(request: EvaluateRequest) -> bool:
    """Return whether the user has named the base by an option."""
    return request.base is not None or request.sets("model.name")


def scored_settings(request: EvaluateRequest, about: Known) -> Iterator[tuple[str, str]]:
    """Yield the settings that decide the scores, by their names in the configuration or of the options."""
    for name, value in leaves(about.settings).items():
        unnamed = name == "model.name" and not about.names_base
        if not unnamed and any(_below(name, one) for one in READ[request.kind]):
            yield name, value
    if request.tasks:
        yield "tasks", ", ".join(request.tasks)
        yield "chat_template", str(request.chat_template)
        yield "system", request.system or "none"
        yield "one_turn", str(request.one_turn)
    else:
        yield "part", request.part or "test"
    yield "samples", str(request.samples or "all")


def _rebased(model: ModelConfig, request: EvaluateRequest) -> ModelConfig:
    """Return the section of the base with the name that the user gave; `model_copy` counts it as set."""
    assert request.base is not None
    same = ModelConfig(name=request.base).located().name == model.located().name
    revision = model.revision if same or request.sets("model.revision") else None
    return model.model_copy(update={"name": request.base, "revision": revision})


def sweeps_of(request: EvaluateRequest) -> list[Path]:
    """Return the folders of the sweeps that targets lie in; names at a server lie in none."""
    if request.url is not None:
        return []
    folders = [Path(split_rank(text)[0]).expanduser() for text in request.targets]
    found = [above for folder in folders if folder.is_dir() and (above := sweep_above(folder))]
    return [*dict.fromkeys(found)]


def chosen(request: EvaluateRequest) -> dict[str, str]:
    """Return the options that decide the scores, besides targets, base and tasks, as a user gave them."""
    options = {
        "config": request.config if isinstance(request.config, str | Path) else None,
        "first questions": request.samples,
        "settings": " ".join(request.overrides),
        "chat template": "in one turn" if request.one_turn else "used" if request.chat_template else None,
        "system message": request.system,
    }
    return {name: str(value) for name, value in options.items() if value}


def _settings(request: EvaluateRequest, sweep: Path | None) -> TrainConfig | TaskSettings:
    if isinstance(request.config, TrainConfig):
        given = request.config
        values = given.model_dump(mode="json", exclude_unset=True)
        return parse(type(given), values, request.overrides) if request.overrides else given
    if request.config is not None:
        return load_train_config(request.config, request.overrides)
    if sweep is not None:
        return load_train_config(sweep / STAMP_FILE, request.overrides)
    if request.tasks:
        return parse(TaskSettings, {}, request.overrides)
    target = request.targets[0]
    there = read_path(split_rank(target)[0], "the target").exists()
    where = "lies in no folder of a sweep or run" if there else "is no folder here"
    raise ConfigError(
        f"{target} {where}, so the data to score it on is not known: "
        "give a configuration that names base and data with --config, or tasks of lm-evaluation-harness with "
        "--task"
    )

"""The configuration file: `PipelineConfig` as a sweep reads it, and `TrainConfig` as `rayft train` does."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, JsonValue

from rayft.analysis.section import AnalyzeConfig
from rayft.config import SINCE, Section, config_errors, config_text, parse, read_yaml
from rayft.data.section import DataConfig
from rayft.methods.section import MethodConfig
from rayft.models.load import REGISTERED, ModelConfig
from rayft.paths import PathText, read_path, runs_folder
from rayft.registry.promote import Gate
from rayft.serving.messages import check_name
from rayft.squeeze.anneal import AnnealConfig
from rayft.squeeze.section import SqueezeConfig
from rayft.sweep.space import MethodSpace, SweepConfig
from rayft.tracking.base import TrackingConfig
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig

__all__ = [
    "IDENTITY_FILE",
    "STAMP_FILE",
    "PipelineConfig",
    "ServeSection",
    "TrainConfig",
    "beginning",
    "config_file",
    "config_values",
    "load_config",
    "load_train_config",
    "package_names",
    "packaged",
]

STAMP_FILE = "config.yaml"
"""The configuration that a sweep or run saves in its output folder; it begins with the stamp."""
IDENTITY_FILE = "identity.json"
"""The file beside it that identifies the data and the base (see `rayft.flow.sweep.identity`)."""
BEGINNING = re.compile(r"# sweep [^\n]*\n# paths begin in (?P<folder>[^\n]+)\n")
"""The first lines of such a file. Its relative paths begin in that folder, seen from its own."""


class ServeSection(Section):
    """How the result of a sweep is served. The model and the adapters follow from the sweep."""

    host: str = "127.0.0.1"
    """Address to listen on."""

    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""

    cpus: int = Field(default=1, ge=1)
    """CPU cores of the replica."""


class TrainConfig(Section):
    """One run or a sweep, and what is done with the results."""

    name: Annotated[str, AfterValidator(check_name)] = "sweep"
    """Name of the sweep or run, of the registered model, and of the served adapter."""

    question: str = ""
    """Question that the sweep answers, shown as the heading of the report."""

    output: PathText | None = None
    """Folder for all results, on the node where the command runs. If not given, it is named after the sweep
    and lies below `runs` in the working directory, below `~/rayft-runs` on a cluster, or below
    RAYFT_OUTPUT."""

    seed: int = Field(default=0, ge=0)
    """Seed of the values that are drawn from ranges. The seeds of trials are `sweep.seeds`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    scale: ScaleConfig = ScaleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    deepspeed: dict[str, JsonValue] = {}
    """Settings that override the derived DeepSpeed configuration."""
    method: MethodConfig | None = Field(default=None, json_schema_extra={SINCE: "0.2"})
    """What `rayft train` trains, with `optim` and `seed`; `lora` at rank 16 if there is neither this section
    nor `sweep`. A sweep has its methods in `sweep.methods`."""

    anneal: AnnealConfig | None = Field(default=None, json_schema_extra={SINCE: "0.2"})
    """How the rank of that run falls from `method.rank` while it trains. A sweep's methods have their own."""

    start: PathText | None = Field(default=None, json_schema_extra={SINCE: "0.2"})
    """Folder of a LoRA, by rayft or PEFT, from which the run or each trial starts. The method must be `lora`
    or `lora_plus`, and the rank that of the adapter."""

    sweep: SweepConfig | None = None
    """What a sweep tries. `rayft train` reads it only if there is no `method`, and it has a single trial."""

    squeeze: SqueezeConfig = SqueezeConfig()
    analyze: AnalyzeConfig = AnalyzeConfig()
    tracking: TrackingConfig = TrackingConfig()
    promote: Gate = Gate()
    serve: ServeSection = ServeSection()

    @property
    def folder(self) -> Path:
        """Absolute path of the folder for all results."""
        place = runs_folder() / self.name if self.output is None else read_path(self.output, "output")
        return place.absolute()

    @property
    def execution(self) -> SweepConfig:
        """The settings of how jobs run in lanes: `sweep`, or its defaults, whose methods mean nothing."""
        return self.sweep or SweepConfig(methods={"lora": MethodSpace()})

    def located(self) -> Self:
        """Return the configuration with absolute paths of base, data and the adapter to start from."""
        start = None if self.start is None else str(Path(self.start).expanduser().absolute())
        paths = {"model": self.model.located(), "data": self.data.located(), "start": start}
        return self.model_copy(update=paths)

    def run(self, gpus: bool | None = None) -> RunConfig:
        """Return the run configuration that all trials share.

        Each `auto` is replaced by a value, and each path is absolute, because workers have other working
        directories.

        Args:
            gpus: whether the cluster has GPUs; None to look at this machine.

        Raises:
            ConfigError: if settings of several sections don't fit together.
        """
        located = self.located()
        with config_errors():
            return RunConfig(
                model=located.model,
                data=located.data,
                optim=self.optim,
                scale=self.scale.settled(gpus),
                evaluate=self.evaluate,
                deepspeed=self.deepspeed,
                start=located.start,
                seed=self.seed,
            )


class PipelineConfig(TrainConfig):
    """A sweep, and what is done with its results."""

    sweep: SweepConfig


def packaged() -> dict[str, Path]:
    """Return the packaged configurations: name → file."""
    folder = Path(str(resources.files("rayft.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def config_file(name: str | Path) -> Path:
    """Return the file of a packaged configuration, or the path that a user wrote.

    Raises:
        ConfigError: if the path can't be one.
    """
    return packaged().get(str(name)) or read_path(name, "the configuration")


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Load a configuration from a file, or a packaged one by its name.

    Args:
        name: the file or the name.
        overrides: settings such as `sweep.trials=4`.

    Raises:
        ConfigError: if there is no such file, or anything in it is wrong.
    """
    return parse(PipelineConfig, config_values(config_file(name)), overrides)


def load_train_config(name: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a configuration that may lack a `sweep`; arguments and errors are those of `load_config`."""
    return parse(TrainConfig, config_values(config_file(name)), overrides)


def config_values(path: Path) -> dict[str, Any]:
    """Read the values of a configuration file.

    Relative paths begin in the working directory. Those in a configuration that a sweep has saved began in
    the working directory of that command, so they are made absolute, unless nothing is there. Its output is
    the folder in which it lies, also after that was moved.

    Raises:
        ConfigError: if there is no such file, or it is no YAML.
    """
    text = config_text(path, base=package_names())
    values = read_yaml(text, str(path))
    if path.name == STAMP_FILE and (found := BEGINNING.match(text)):
        _relocate(values, path.parent.resolve(), found["folder"])
    return values


def beginning(output: Path) -> str:
    """Return the line of a configuration saved in `output` that says where its relative paths begin."""
    return f"# paths begin in {os.path.relpath(Path.cwd(), output.resolve())}\n"


def _relocate(values: dict[str, Any], own: Path, begin: str) -> None:
    """Make the relative paths in the values of a saved configuration absolute.

    Args:
        values: of the file.
        own: folder of the file, which is the output folder.
        begin: where its relative paths begin, seen from there.
    """

    def moved(text: str) -> str:
        path = Path(os.path.normpath(own / begin / text))
        # The project may have been moved, and the output folder not.
        return text if text.startswith("~") or not path.exists() else str(path)

    def move(section: Any, *keys: str, by: Callable[[str], str] = moved) -> None:
        for key in keys if isinstance(section, Mapping) else ():
            if isinstance(section.get(key), str) and section[key]:
                section[key] = by(section[key])

    data = values.get("data")
    if isinstance(data, dict):
        if data.get("source") not in ("reasoning_gym", "hub"):
            move(data, "name")
            move(data.get("files"), "train", "val", "test")
        move(data.get("scorer"), "file")
    move(values.get("model"), "name", by=lambda name: name if name in REGISTERED else moved(name))
    move(values, "start")
    move(values.get("tracking"), "uri", by=lambda uri: _moved_uri(uri, moved))
    # The recorded output is where the folder was before it was moved. A copy of the file alone keeps it.
    if (own / IDENTITY_FILE).is_file() or not Path(str(values.get("output") or "")).is_absolute():
        values["output"] = str(own)


def _moved_uri(uri: str, moved: Callable[[str], str]) -> str:
    prefix, separator, path = uri.partition(":///")
    return f"{prefix}{separator}{moved(path)}" if separator and prefix.startswith("sqlite") else uri


def package_names() -> str:
    """Return the names of the packaged configurations, for messages."""
    return f"rayft: {', '.join(packaged())}"

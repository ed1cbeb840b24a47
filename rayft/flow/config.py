"""The configuration file: `PipelineConfig` as a sweep reads it, and `TrainConfig` as `rayft train` does."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from pydantic import Field, JsonValue, field_validator

from rayft.analysis.section import AnalyzeConfig
from rayft.config import SINCE, Section, load
from rayft.data.section import DataConfig
from rayft.methods.section import MethodConfig
from rayft.models.load import ModelConfig
from rayft.paths import PathText, read_path, runs_folder
from rayft.registry.promote import Gate
from rayft.squeeze.anneal import AnnealConfig
from rayft.squeeze.section import SqueezeConfig
from rayft.sweep.space import MethodSpace, SweepConfig
from rayft.tracking.base import TrackingConfig
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig

__all__ = [
    "PipelineConfig",
    "ServeSection",
    "TrainConfig",
    "config_file",
    "load_config",
    "load_train_config",
    "package_names",
    "packaged",
]


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

    name: str = "sweep"
    """Name of the sweep or run, and of the registered model."""

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

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not value or not all(c.isalnum() or c in "-_." for c in value):
            raise ValueError("use letters, digits, '-', '_' and '.'")
        return value

    @property
    def folder(self) -> Path:
        """Absolute path of the folder for all results."""
        place = runs_folder() / self.name if self.output is None else read_path(self.output, "output")
        return place.absolute()

    @property
    def execution(self) -> SweepConfig:
        """The settings of how jobs run in lanes: `sweep`, or its defaults, whose methods mean nothing."""
        return self.sweep or SweepConfig(methods={"lora": MethodSpace()})

    def run(self, gpus: bool | None = None) -> RunConfig:
        """Return the run configuration that all trials share.

        Each `auto` is replaced by a value, and each path is absolute, because workers have other working
        directories.

        Args:
            gpus: whether the cluster has GPUs; None to look at this machine.
        """
        return RunConfig(
            model=self.model.located(),
            data=self.data.located(),
            optim=self.optim,
            scale=self.scale.settled(gpus),
            evaluate=self.evaluate,
            deepspeed=self.deepspeed,
            start=self.start,
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
    return load(PipelineConfig, config_file(name), overrides, base=package_names())


def load_train_config(name: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a configuration that may lack a `sweep`; arguments and errors are those of `load_config`."""
    return load(TrainConfig, config_file(name), overrides, base=package_names())


def package_names() -> str:
    """Return the names of the packaged configurations, for messages."""
    return f"rayft: {', '.join(packaged())}"

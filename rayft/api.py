"""The Python API: what the commands do, as functions that return what they made.

`import rayft` offers everything here. Each function checks its input like the command of its name, raises
`rayft.errors.RayftError` with what to do, and continues what an earlier call with the same output folder has
begun. An argument of a wrong type is a `ConfigError`, too.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rich.console import Console

from rayft.artifacts import AdapterArtifact
from rayft.artifacts.adapter import check_prefix
from rayft.config import parse
from rayft.errors import ModelError, SqueezeError
from rayft.flow.chat.conversation import Conversation, Piece
from rayft.flow.chat.models import Options, open_models
from rayft.flow.cluster import placed
from rayft.flow.config import PipelineConfig, TrainConfig, config_file, config_values
from rayft.flow.console import terminal
from rayft.flow.display import Display
from rayft.flow.evaluate.record import Evaluation
from rayft.flow.evaluate.request import EvaluateRequest
from rayft.flow.evaluate.run import evaluate as evaluate_targets
from rayft.flow.export.run import Exported, export_adapter
from rayft.flow.guest import alone, checked, left_as_found
from rayft.flow.init import find_data, write_configuration
from rayft.flow.options import check_overrides
from rayft.flow.scoring import Measured
from rayft.flow.settings import Settings, schema, settings
from rayft.flow.squeeze.request import squeeze_request
from rayft.flow.squeeze.run import squeeze_folder
from rayft.flow.sweep.publish import check_complete
from rayft.flow.sweep.run import run_sweep
from rayft.flow.target import Place, at_rank, find_place, registry_uri
from rayft.flow.train import start_folder, train_run
from rayft.models.base import base_of
from rayft.models.files import quiet as without_bars
from rayft.models.load import resolve
from rayft.paths import read_path
from rayft.report.record import Score, SweepRecord

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "Adapter",
    "Conversation",
    "Evaluation",
    "Exported",
    "Piece",
    "Run",
    "Settings",
    "Squeezed",
    "Sweep",
    "chat",
    "config",
    "evaluate",
    "export",
    "init",
    "load",
    "schema",
    "squeeze",
    "sweep",
    "train",
]

ConfigT = TypeVar("ConfigT", bound=TrainConfig)

export = checked(left_as_found()(export_adapter))
# It is pickled by this name.
export.__module__, export.__qualname__, export.__name__ = __name__, "export", "export"


@dataclass(frozen=True)
class Run:
    """A run that has been trained: alone, or as a trial of a sweep."""

    name: str
    """Name of the run; of a trial, such as `lora-r16-lr0.002-s0`."""
    folder: Path
    """The output folder; of a trial, that of the sweep."""
    adapter: Path
    """Folder of the adapter, or of the whole model if the method trains that."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Part of the data (`val`, `test`) → mean score; empty for raw text."""
    val_loss: float | None = None
    """The last validation loss, in nats for each learnt token."""
    run_id: str = ""
    """The run in MLflow."""


@dataclass(frozen=True)
class Sweep:
    """A sweep that has ended."""

    folder: Path
    """The output folder."""
    report: Path
    """The report, one HTML file."""
    adapter: Path | None
    """Folder of the adapter that ships: the winner, or the smallest version of it that keeps its score. None
    if no trial has finished."""
    scores: Mapping[str, float]
    """Scores of that adapter: part of the data → mean."""
    run_id: str
    """The run in MLflow of the trial that won; empty if no trial has finished."""
    winner: Run | None
    """The trial that won."""
    trials: tuple[Run, ...]
    """The trials that have finished, in the order in which they were started."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Name of a trial that has failed → the reason."""


@dataclass(frozen=True)
class Squeezed:
    """An adapter that was brought to lower ranks."""

    folder: Path
    """The output folder."""
    adapters: Mapping[str, Path]
    """Label of a result, such as `r8`, `e0.95` or `b1.5MB` → folder of the adapter."""
    scores: Mapping[str, Mapping[str, float]]
    """Label → part of the data → mean score; empty if nothing was scored. The source's label is `source`."""
    chosen: Path | None = None
    """The smallest result that keeps the score, if `keep_score` was given."""


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """An adapter in memory. `artifact.content_hash` compares two by their content."""

    artifact: AdapterArtifact
    """Its factors, module by module."""

    def __repr__(self) -> str:
        return f"Adapter(rank={self.rank}, base={self.base!r}, method={self.method!r})"

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return self.artifact.rank

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks at which it can be used: all up to its own if it was squeezed, or else its own alone."""
        return tuple(range(1, self.rank + 1)) if self.artifact.squeezed else (self.rank,)

    @property
    def base(self) -> str:
        """Name of the base that it was made for; empty if it is not recorded."""
        return self.artifact.meta.base_model

    @property
    def method(self) -> str:
        """Name of the method that trained it."""
        return self.artifact.meta.method

    @property
    def parameters(self) -> int:
        """Count of its numbers."""
        return self.artifact.parameters

    @checked
    def at(self, rank: int) -> Adapter:
        """Return the adapter at another of its `ranks`, as a view of the same numbers.

        Raises:
            SqueezeError: if it can't be used at that rank.
            ConfigError: if the rank is no whole number.
        """
        if rank == self.rank:
            return self
        check_prefix(rank, self.rank, squeezed=self.artifact.squeezed)
        if rank > self.rank:
            raise SqueezeError(f"rank {rank} is above the adapter's own; ask for 1 to {self.rank}")
        return replace(self, artifact=self.artifact.at_rank(rank))

    @checked
    def save(self, folder: str | PathLike[str]) -> Path:
        """Write it as a folder that PEFT loads, whole or not at all, and return the folder.

        Raises:
            ArtifactError: if the folder holds anything but an adapter that rayft wrote.
            DiskFullError: if there is no space.
        """
        return self.artifact.save(read_path(Path(folder), "folder"))

    @left_as_found()
    def peft_model(self, model: PreTrainedModel | None = None) -> PeftModel:
        """Return PEFT's model: a base with this adapter.

        Args:
            model: the base, which is changed; by default the language model that the adapter names is loaded
                in float32 on the CPU.

        Raises:
            ModelError: if the base is not named, can't be loaded, or holds adapters already.
            BaseMismatchError: if the base lacks a layer of the adapter.
        """
        import torch
        import transformers
        from peft import PeftModel

        from rayft.models.targets import check_bare, linear_shapes

        if model is not None:
            check_bare(model)
        # PEFT draws factors, which the adapter's then replace.
        with (
            without_bars(),
            warnings.catch_warnings(),
            torch.random.fork_rng([]),
            tempfile.TemporaryDirectory() as folder,
        ):
            # PEFT asks a model of transformers for it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            if model is None:
                base = base_of(self.artifact)
                if base is None or base.task != "causal_lm":
                    raise ModelError(
                        "the adapter names no language model as its base: pass the base as `model`"
                    )
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    resolve(base), revision=base.revision or "main", dtype=torch.float32
                )
            self.artifact.check_base("", linear_shapes(model))
            self.artifact.save(Path(folder) / "adapter")
            return PeftModel.from_pretrained(model, Path(folder) / "adapter").eval()


Config = str | PathLike[str] | Mapping[str, Any] | TrainConfig
"""A file or the name of a packaged configuration, its content as a mapping, or a configuration object."""


@checked
@left_as_found()
def init(
    data: str | PathLike[str] | None = None,
    *,
    model: str | None = None,
    out: str | PathLike[str] = "my.yaml",
    overwrite: bool = False,
) -> Path:
    """Write a configuration for your data, one that runs as it is, as `rayft init` does; return the file.

    Args:
        data: a file of JSON lines, CSV or Parquet, a folder of images, or the name of a hub set (`org/set`,
            `org/set:config`); by default the only data file in the working directory.
        model: the base; by default one that is on this machine.
        out: the file to write.
        overwrite: whether a file at `out` is replaced.

    Raises:
        ConfigError: if there is a file at `out`, or no base.
        DataError: if the data can't be read or looked up, or has columns that can't be trained on.
        ModelError: if the base can't be found.
    """
    file = read_path(os.fspath(out), "out")
    source = find_data(Path.cwd()) if data is None else os.fspath(data)
    write_configuration(source, file, model, overwrite=overwrite)
    return file


@checked
def config(config: Config = "demo", *, overrides: Sequence[str] = ()) -> Settings:
    """Return the settings in force, and where each comes from, as `rayft config` shows them.

    Args:
        config: the configuration, which needs no `sweep`.
        overrides: settings of the configuration, such as `optim.lr=1e-3`.

    Raises:
        ConfigError: if there is no such file, or anything in it is wrong.
    """
    return settings(config, overrides)


@checked
@alone()
@left_as_found()
def train(
    config: Config,
    *,
    start: str | PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Run:
    """Train one run without a search, or continue it, as `rayft train` does.

    Args:
        config: the configuration, which needs no `sweep`.
        start: folder of a LoRA to go on from, or of the run that trained it, in place of the configuration's.
        overrides: settings of the configuration, such as `optim.lr=1e-3`.
        quiet: whether to print nothing.

    Raises:
        RayftError: if a check fails, before anything has started, or if the run fails.
    """
    check_overrides("train", overrides)
    settings = _read(TrainConfig, config, overrides)
    if start is not None:
        settings = settings.model_copy(update={"start": str(start_folder(os.fspath(start), "start"))})
    done = train_run(settings, _display(quiet))
    return Run(
        settings.name, done.folder, done.adapter, _means(done.scores), done.result.val_loss, done.run_id
    )


@checked
@alone()
@left_as_found()
def sweep(config: Config, *, overrides: Sequence[str] = (), quiet: bool = False) -> Sweep:
    """Run a sweep, or continue it, as `rayft sweep` does: search, score, squeeze, register and report.

    Args:
        config: the configuration.
        overrides: settings of the configuration, such as `sweep.trials=4`.
        quiet: whether to print nothing.

    Raises:
        RayftError: if a check fails, before anything has started, or if a stage fails.
        TrainError: if every trial has failed.
        UnfinishedError: if the results are in the folder, but something is left to do; call it again.
    """
    check_overrides("sweep", overrides)
    settings, display = placed(_read(PipelineConfig, config, overrides)), _display(quiet)
    record = run_sweep(settings, display)
    check_complete(record, display.undone)
    return _sweep(record, settings.folder)


@checked
@alone()
@left_as_found()
def squeeze(
    path: str | PathLike[str],
    ranks: Sequence[int] = (),
    *,
    energies: Sequence[float] = (),
    budgets: Sequence[str] = (),
    keep_score: float | None = None,
    steps: int | None = None,
    lr: float | None = None,
    config: str | PathLike[str] | None = None,
    base: str | None = None,
    device: str | None = None,
    uri: str | None = None,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Squeezed:
    """Bring an adapter to lower ranks, or extract LoRAs from a fine-tuned model, as `rayft squeeze` does.

    Args:
        path: folder of an adapter, of a model, or an output folder of `train` or `sweep`, or
            `models:/name@alias`. A rank may follow, from which squeezing then starts (`runs/mine@r8`).
        ranks: ranks to squeeze to.
        energies: shares of energy to retain, in (0, 1].
        budgets: sizes such as `1.5MB`; ranks go to the modules that need them.
        keep_score: share of the validation score that the smallest result must keep, in (0, 1].
        steps: optimizer steps of further training.
        lr: learning rate of further training; by default that of the source.
        config: file of a configuration that names base and data; by default that of the source's folder.
        base: name of the base, which the adapter is checked against or a model compared with.
        device: where to compute, `cpu`, `cuda` or `cuda:1`.
        uri: MLflow, for `models:/…`; MLFLOW_TRACKING_URI by default.
        out: folder for the results; by default that of the source with `-squeezed` after its name.
        overwrite: whether adapters that another command of rayft made are replaced.
        quiet: whether to print nothing.

    Raises:
        SqueezeError, ArtifactError, ConfigError: naming what is wrong. The source stays as it is.
    """
    text = os.fspath(path)
    with tempfile.TemporaryDirectory() as scratch:
        source = find_place(text, registry_uri(text, uri), Path(scratch))
        place = _squeezed_folder(source) if out is None else read_path(Path(out), "out")
        request = squeeze_request(
            source,
            place,
            ranks=ranks,
            energies=energies,
            budgets=budgets,
            keep_score=keep_score,
            steps=steps,
            lr=lr,
            config=None if config is None else read_path(Path(config), "config"),
            base=base,
            device=device,
            overwrite=overwrite,
        )
        found = squeeze_folder(request, _console(quiet))
    labels = {found.source.name: "source", **{item.name: item.folder.name for item in found.made}}
    return Squeezed(
        place.absolute(),
        {item.folder.name: item.folder for item in found.made},
        {labels[name]: _means(scores) for name, scores in found.scores.items() if name in labels},
        found.chosen.folder if found.chosen else None,
    )


@checked
@left_as_found()
def evaluate(
    target: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    *,
    config: Config | None = None,
    overrides: Sequence[str] = (),
    part: Literal["val", "test"] | None = None,
    rank: int | None = None,
    samples: int | None = None,
    tasks: Sequence[str] = (),
    include: str | PathLike[str] | None = None,
    chat_template: bool = False,
    system: str | None = None,
    one_turn: bool = False,
    url: str | None = None,
    base: str | None = None,
    uri: str | None = None,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Evaluation:
    """Score an adapter or a model, or compare two, as `rayft eval` does.

    Args:
        target: folder of an adapter or a model, name of a model, or `models:/name@alias`; a rank may follow
            (`runs/mine@r8`). With `url`, a name that the server serves.
        against: another one, to compare with on the same questions; `base` stands for the base of `target`.
        config: the configuration that names base and data; by default that of the target's sweep or run.
        overrides: settings of the configuration, such as `evaluate.max_new_tokens=64`.
        part: the part of the data; `test` by default.
        rank: rank of the adapters whose names have none.
        samples: number of questions; all by default.
        tasks: tasks of lm-evaluation-harness, which take the place of the data.
        include: folder with further tasks.
        chat_template: whether the questions of tasks are asked in the model's chat template.
        system: system message before each question of a task.
        one_turn: whether, in the chat template, solved examples are in one turn with the question.
        url: URL of an OpenAI-compatible server for tasks.
        base: the base, in place of the configuration's or the adapter's.
        uri: MLflow, for `models:/…` and for tracking.
        out: JSON file for the result.
        overwrite: whether an earlier evaluation in `out` is replaced.
        quiet: whether to print nothing.

    Raises:
        RayftError: naming what is wrong, before weights are loaded.
    """
    request = EvaluateRequest(
        targets=tuple(str(one) for one in (target, against) if one is not None),
        config=None if config is None else _read(TrainConfig, config, ()),
        overrides=tuple(overrides),
        part=part,
        rank=rank,
        samples=samples,
        tasks=tuple(tasks),
        include=None if include is None else read_path(Path(include), "include"),
        chat_template=chat_template,
        system=system,
        one_turn=one_turn,
        url=url,
        base=base,
        uri=uri,
        out=None if out is None else read_path(Path(out), "out"),
        overwrite=overwrite,
    )
    return evaluate_targets(request, _display(quiet).say)


@checked
@left_as_found()
def chat(
    model: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    *,
    url: str | None = None,
    base: str | None = None,
    uri: str | None = None,
    system: str | None = None,
    temperature: float = 0.7,
    max_tokens: int = 512,
) -> Conversation:
    """Begin a conversation with a model, or with two that are asked the same, as `rayft chat` does.

    Close it, or use it in a `with` statement: until then the models stay in memory.

    Args:
        model: a base, the folder of an adapter, sweep or run, or `models:/name@alias`; a rank may follow
            (`runs/mine@r8`). With `url`, a name that the server serves.
        against: another one, beside it; `base` stands for the base of `model`.
        url: URL of a running server; by default the models are loaded into this process, on the CPU.
        base: the base of adapters that name none, or in place of the one that they name.
        uri: MLflow, for `models:/…`.
        system: message at the beginning, which the models follow.
        temperature: from 0 to 2; 0 always takes the most likely token.
        max_tokens: largest number of tokens of an answer.

    Raises:
        RayftError: naming what can't be loaded or reached, before weights are loaded.
    """
    options = Options(temperature, max_tokens)
    names = [str(one) for one in (model, against) if one is not None]
    with ExitStack() as stack:
        models = stack.enter_context(open_models(names, url=url, base=base, uri=uri))
        return Conversation(models, options, system, stack.pop_all().close)


@checked
@left_as_found()
def load(path: str | PathLike[str], *, uri: str | None = None) -> Adapter:
    """Load an adapter: any LoRA that PEFT loads, or what an output folder of `train` or `sweep` holds.

    Args:
        path: folder of the adapter, or `models:/name@alias`; a rank may follow (`runs/mine@r8`).
        uri: MLflow, for `models:/…`; MLFLOW_TRACKING_URI by default.

    Raises:
        ArtifactError: if it can't be read, naming the file and what to do.
        ConfigError: if the path can't be one, or `uri` is given and is not used.
        RegistryError: if there is no such registered adapter.
        SqueezeError: if it does not have the rank.
    """
    text = os.fspath(path)
    with tempfile.TemporaryDirectory() as scratch:
        return Adapter(at_rank(find_place(text, registry_uri(text, uri), Path(scratch))))


def _read(kind: type[ConfigT], config: Config, overrides: Sequence[str]) -> ConfigT:
    """Read a configuration.

    Raises:
        ConfigError: if there is no such file, or anything in it is wrong.
    """
    if isinstance(config, kind) and not overrides:
        return config
    if isinstance(config, TrainConfig):
        config = config.model_dump(mode="json", exclude_unset=True)
    if isinstance(config, Mapping):
        return parse(kind, config, overrides)
    return parse(kind, config_values(config_file(str(config))), overrides)


def _squeezed_folder(source: Place) -> Path:
    """Return the folder for what is squeezed from a source: beside it."""
    if source.registered:
        raise SqueezeError(f"{source.name} is in a registry: name a folder for the results with out")
    # The path `.` has no name, and `..` not that of its folder.
    named = source.folder if source.folder.name not in ("", "..") else source.folder.resolve()
    return named.parent / f"{named.name}-squeezed"


def _console(quiet: bool) -> Console:
    return Console(quiet=True) if quiet else terminal()


def _display(quiet: bool) -> Display:
    return Display(_console(quiet))


def _means(scores: Measured) -> dict[str, float]:
    found = {part: scores.mean(part) for part in scores.parts}
    return {part: value for part, value in found.items() if value is not None}


def _scores(val: float | None, test: Score | None) -> dict[str, float]:
    return {
        **({} if val is None else {"val": val}),
        **({} if test is None else {"test": test.value}),
    }


def _sweep(record: SweepRecord, folder: Path) -> Sweep:
    trials = {
        trial.id: Run(
            name=trial.id,
            folder=folder,
            adapter=Path(trial.folder),
            scores=_scores(trial.val_score, trial.test),
            val_loss=trial.kept_val_loss,
            run_id=trial.run_id,
        )
        for trial in record.trials
        if trial.status == "finished" or (record.winner and trial.id == record.winner.trial)
    }
    winner = trials.get(record.winner.trial) if record.winner else None
    adapter, scores = None, {}
    if record.winner and winner:
        small = next((item for item in record.squeezed if item.name == record.winner.ship), None)
        whole = folder / "winner"
        adapter = Path(small.folder) if small else whole if whole.is_dir() else winner.adapter
        scores = _scores(small.val_score, small.test) if small else dict(winner.scores)
    return Sweep(
        folder=folder,
        report=folder / "report.html",
        adapter=adapter,
        scores=scores,
        run_id=winner.run_id if winner else "",
        winner=winner,
        trials=tuple(trials.values()),
        failed={trial.id: trial.reason for trial in record.trials if trial.status == "failed"},
    )

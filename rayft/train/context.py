"""What a training loop runs in: its place among the workers, its reporter, the base and the data.

The loop knows nothing of Ray: whoever runs it hands it a `Worker`, a `Reporter` and a `Session`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from rayft.data.loader import Schedule
from rayft.data.pack import AnyEncoded
from rayft.data.source import Parts, read
from rayft.data.template import encode_all
from rayft.errors import ConfigError, RayftError
from rayft.identity import UNKNOWN, Identity
from rayft.models.inject import wrap
from rayft.models.load import LoadedModel, load_model
from rayft.train.home import Home
from rayft.train.identity import identify
from rayft.train.run import RunConfig

__all__ = ["Reporter", "Session", "SilentReporter", "Worker", "check_task", "trial_folder"]


@dataclass(frozen=True)
class Worker:
    """One process among those of a run."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @classmethod
    def current(cls, device: str) -> Worker:
        """Read the place from torch.distributed (alone where that is not initialised)."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    def total(self, *values: float) -> list[float]:
        """Sum numbers over all workers."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def largest(self, value: int) -> int:
        """Give the largest of all workers' numbers."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def same(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give rank 0's tensor to all: what each computes may differ by rounding, or by a sign in an SVD."""
        tensor = tensor.contiguous()
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def share(self, value: bool) -> bool:
        """Let rank 0 decide for all."""
        if self.world == 1:
            return value
        tensor = torch.tensor([int(value)], device=self.device)
        dist.broadcast(tensor, 0)
        return bool(tensor.item())

    def agreed(self, value: Any) -> Any:
        """Return rank 0's value, any object that can be pickled, on all workers."""
        if self.world == 1:
            return value
        box = [value]
        # Ray Train gives GPU groups NCCL alone, which moves objects through the device.
        dist.broadcast_object_list(box, 0)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """End a block with an error on all workers if it ends with one on any (all workers call it).

        Otherwise the others would wait for it without end in their next exchange. The block itself must not
        exchange anything after what may fail.

        Raises:
            RayftError: this worker's own, or else the first of another's.
        """
        error: RayftError | None = None
        try:
            yield
        except RayftError as own:
            error = own
        if self.world > 1:
            errors: list[RayftError | None] = [None] * self.world
            dist.all_gather_object(errors, error)
            error = error or next((each for each in errors if each is not None), None)
        if error is not None:
            raise error


class Reporter(Protocol):
    """Where a run's numbers go; rank 0 alone calls it."""

    @property
    def interrupted(self) -> bool:
        """Return whether the run has to save a checkpoint and end; asked after each step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers of a training step, without waiting."""

    def report(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take the numbers of an evaluation and say whether to go on."""

    def note(self, text: str) -> None:
        """Take a sentence that a person should read."""


class SilentReporter:
    """Keeps what it is told; never stops a run."""

    interrupted = False

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.reported: list[tuple[int, dict[str, float]]] = []
        self.notes: list[str] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep a step's numbers."""
        self.logged.append((step, dict(metrics)))

    def report(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Keep an evaluation's numbers."""
        self.reported.append((step, dict(metrics)))
        return True

    def note(self, text: str) -> None:
        """Keep a sentence."""
        self.notes.append(text)


@dataclass
class Session:
    """A base model and encoded data in memory; several runs may use it one after the other."""

    loaded: LoadedModel
    parts: Parts
    train: list[AnyEncoded]
    val: list[AnyEncoded]
    worker: Worker
    identity: Identity = UNKNOWN
    """Of the base and the data."""
    schedules: dict[tuple[int, int], Schedule] = field(default_factory=dict)
    ticks: int = 0
    """Batches that were trained or evaluated on, so that others can see that this process works."""
    home: Home = field(default_factory=Home)
    """Where the files of the command are."""

    @classmethod
    def open(
        cls,
        run: RunConfig,
        worker: Worker,
        home: Home | None = None,
        *,
        identify_base: bool = True,
        whole: bool = False,
    ) -> Session:
        """Read and encode the data, load the base and wrap its linear layers.

        Args:
            run: names base and data.
            worker: this process.
            home: where the files of the command are; on this node's disk where not given.
            identify_base: whether the base's files are hashed for `identity`.
            whole: whether each worker gets the whole base, also where the run partitions it: without an
                engine, nothing gathers what ZeRO-3 has partitioned.

        Raises:
            DataError, ModelError: as `read`, `encode_all` and `load_model`.
        """
        home = home or Home()
        run = _located(run, home)
        parts = read(run.data)
        check_task(run, parts)
        # Before it is loaded: files that are edited meanwhile are noticed by whoever compares next.
        identity = identify(run, parts, with_base=identify_base)
        if run.scale.zero == 3 and worker.world > 1 and not whole:
            from rayft.train.partition import load_partitioned

            loaded = load_partitioned(run, worker)
        else:
            loaded = load_model(run.model, run.scale.torch_dtype, worker.device)
            wrap(loaded.model)
        train, val = (
            [*encode_all(part, loaded.tokenizer, run.data.max_length, context=loaded.context, part=name)]
            for name, part in (("train", parts.train), ("val", parts.val[: run.evaluate.val_examples]))
        )
        identity = identity.model_copy(update={"fingerprint": loaded.fingerprint})
        return cls(loaded, parts, train, val, worker, identity, home=home)

    def schedule(self, run: RunConfig) -> Schedule:
        """Give the order of packed rows for a run's seed (kept, since trials share it)."""
        key = (run.seed, run.optim.rows_per_step)
        if key not in self.schedules:
            self.schedules[key] = Schedule(
                self.train,
                run.data.max_length,
                run.optim.rows_per_step,
                run.seed,
                packing=run.data.packing,
            )
        return self.schedules[key]

    @property
    def pad_id(self) -> int:
        """The token that fills rows up (0 where rows are images)."""
        return int(getattr(self.loaded.tokenizer, "pad_token_id", None) or 0)


def _located(run: RunConfig, home: Home) -> RunConfig:
    """Return a run whose base and data are where this node has them."""
    model, data = run.model, run.data
    model = model.model_copy(update={"name": str(home.local(model.name))})
    if data.source not in ("reasoning_gym", "hub"):
        name = str(home.local(data.name)) if data.name else ""
        files = data.files
        if files is not None:
            there = {part: str(home.local(path)) for part, path in files if path is not None}
            files = files.model_copy(update=there)
        data = data.model_copy(update={"name": name, "files": files})
    return run.model_copy(update={"model": model, "data": data})


def check_task(run: RunConfig, parts: Parts) -> None:
    """Refuse data that doesn't fit what the model does.

    Raises:
        ConfigError: naming the setting to change.
    """
    labelled, task = bool(parts.labels), run.model.task
    if not labelled and task != "causal_lm":
        raise ConfigError(f"model.task is {task}, but the data has no classes; set data.format")
    wanted = "image_classification" if parts.has_images else "sequence_classification"
    if labelled and task != wanted:
        content = "images with classes" if parts.has_images else "classes"
        raise ConfigError(f"the data has {content}, so set model.task: {wanted}")
    if labelled and len(parts.labels) != run.model.num_labels:
        raise ConfigError(
            f"the data has {len(parts.labels)} classes ({', '.join(parts.labels[:8])}), model.num_labels is "
            f"{run.model.num_labels}; set it to {len(parts.labels)}"
        )


def trial_folder(output: str | Path, key: str) -> Path:
    """Where a run keeps its checkpoint and adapter."""
    return Path(output) / "trials" / key

"""What a trainer is given: its place among the workers, a reporter, and the base and the data in memory.

Training does not depend on Ray: the caller passes a `Worker`, a `Reporter` and a `Session`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rayft.data.loader import RowStream
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

__all__ = ["Reporter", "Session", "Worker", "check_task", "trial_folder"]


@dataclass(frozen=True)
class Worker:
    """One process of a run, and what it exchanges with the others.

    All workers must call `total`, `largest`, `same`, `share`, `agreed` and `together` at the same points.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @classmethod
    def current(cls, device: str) -> Worker:
        """Return this process's place in torch.distributed; if that is not initialised, the only worker."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    def total(self, *values: float) -> list[float]:
        """Return the sums of numbers over all workers."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def largest(self, value: int) -> int:
        """Return the largest of all workers' numbers."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def same(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return rank 0's tensor on all workers.

        What each worker computes may differ by rounding, or by a sign in an SVD.
        """
        tensor = tensor.contiguous()
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def share(self, value: bool) -> bool:
        """Return rank 0's decision on all workers."""
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
        """Raise an error on all workers if the block raises a `RayftError` on any of them.

        Without this, the other workers would wait forever in their next exchange. The block itself must not
        exchange anything after a statement that may fail.

        Raises:
            RayftError: this worker's own error, or else the first one of another worker.
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


class Reporter:
    """Receives a run's numbers, and may end the run. Only rank 0 calls it.

    This class ignores all numbers and never ends a run; a subclass overrides what it needs.
    """

    @property
    def interrupted(self) -> bool:
        """Whether the run has to save a checkpoint and end; read after each step."""
        return False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receive the numbers of a training step; must not block."""

    def report(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Receive the numbers of an evaluation, and return whether the run continues."""
        return True

    def note(self, text: str) -> None:
        """Receive a sentence that a person should read."""


@dataclass
class Session:
    """A base model and encoded data in memory, which several runs may use one after the other."""

    loaded: LoadedModel
    parts: Parts
    train: list[AnyEncoded]
    val: list[AnyEncoded]
    worker: Worker
    identity: Identity = UNKNOWN
    """Identity of the base and the data."""
    row_streams: dict[tuple[int, int], RowStream] = field(default_factory=dict)
    """(seed, rows of a step) → the rows."""
    ticks: int = 0
    """Number of batches that were trained or evaluated on. It shows others that this process makes
    progress."""
    home: Home = field(default_factory=Home)
    """Where the command's files are."""

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
            run: names the base and the data.
            worker: this process.
            home: where the command's files are; by default on this node's disk.
            identify_base: whether to hash the base's files for `identity`.
            whole: whether each worker loads the whole base even if the run partitions it. Without an engine,
                nothing gathers the parameters that ZeRO-3 has partitioned.

        Raises:
            ConfigError: if the data does not fit the model's task.
            DataError, ModelError: as raised by `read`, `encode_all` and `load_model`.
        """
        home = home or Home()
        run = _located(run, home)
        parts = read(run.data)
        check_task(run, parts)
        # Before loading: if the files change meanwhile, the next comparison of identities finds that.
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

    def row_stream(self, run: RunConfig) -> RowStream:
        """Return the packed rows in the order of a run's seed; they are kept, since trials share them."""
        key = (run.seed, run.optim.rows_per_step)
        if key not in self.row_streams:
            self.row_streams[key] = RowStream(
                self.train,
                run.data.max_length,
                run.optim.rows_per_step,
                run.seed,
                packing=run.data.packing,
            )
        return self.row_streams[key]

    @property
    def pad_id(self) -> int:
        """The token that pads rows (0 if rows are images)."""
        return int(getattr(self.loaded.tokenizer, "pad_token_id", None) or 0)


def _located(run: RunConfig, home: Home) -> RunConfig:
    """Return the run with the paths of its base and data replaced by those on this node."""
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
    """Refuse data that does not fit the model's task.

    Raises:
        ConfigError: the message names the setting to change.
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
    """Return the folder in which a trial keeps its checkpoints, its adapter and its result."""
    return Path(output) / "trials" / key

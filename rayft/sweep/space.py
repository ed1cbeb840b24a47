"""The search space: methods × ranks × learning rates × seeds, each point a whole `RunConfig`.

Each method has its own learning rates, because the best learning rates differ by more than the methods do.
Lists make a grid; a `{low, high}` range is sampled log-uniformly. Every point is built, and so validated,
before anything starts.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator
from torch import nn

from rayft.config import SINCE, Section, config_errors
from rayft.errors import ConfigError, MethodError
from rayft.methods.base import ChainConfig, MethodConfig
from rayft.models.methods import method
from rayft.models.packed import unpackable
from rayft.numerics import derive_seed
from rayft.squeeze.anneal import AnnealConfig
from rayft.sweep.broker import Patience
from rayft.train.run import RunConfig, ScaleConfig, why_alone

__all__ = [
    "LogUniform",
    "MethodSpace",
    "Point",
    "SweepConfig",
    "check_distinct",
    "check_executor",
    "check_slots",
    "points",
    "slots_asked",
]

DRAWS = 1000
"""How often a learning rate is drawn again that was drawn before at the same rank."""


class LogUniform(Section):
    """A range that is sampled log-uniformly."""

    low: float = Field(gt=0, allow_inf_nan=False)
    """Smallest value."""
    high: float = Field(gt=0, allow_inf_nan=False)
    """Largest value."""

    @model_validator(mode="after")
    def _ordered(self) -> LogUniform:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


class MethodSpace(Section):
    """The settings that are tried of one method."""

    ranks: tuple[int, ...] = (16,)
    """Ranks to train at. Squeezing to a lower rank is cheaper than training again."""

    lr: tuple[float, ...] | LogUniform = (2e-3,)
    """Learning rates: a list, or a range to sample from."""

    alpha: float | None = Field(default=None, gt=0)
    """Scale numerator α; by default 2·rank."""

    rslora: bool = False
    """Scale by α/√rank instead of α/rank."""

    targets: str | tuple[str, ...] = "all-linear"
    """As in `method.targets`."""

    rank_pattern: dict[str, int] = {}
    """As in `method.rank_pattern`."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """As in `method.dropout`."""

    chain: ChainConfig | None = None
    """As in `method.chain`."""

    lr_ratio: float | None = Field(default=None, gt=0)
    """As in `method.lr_ratio`."""

    options: dict[str, JsonValue] = {}
    """As in `method.options`."""

    anneal: AnnealConfig | None = None
    """Lower the rank from each of `ranks` while a trial trains."""

    @field_validator("ranks")
    @classmethod
    def _ranks_positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError("needs at least one rank, and ranks start at 1")
        return value

    @field_validator("lr")
    @classmethod
    def _lr_positive(cls, value: tuple[float, ...] | LogUniform) -> tuple[float, ...] | LogUniform:
        if isinstance(value, tuple) and not (value and all(0 < lr < math.inf for lr in value)):
            raise ValueError("needs at least one learning rate, all above 0 and finite")
        return value


class SweepConfig(Section):
    """What to try, and when to stop trying it."""

    methods: dict[str, MethodSpace]
    """Method name → the settings that are tried of it."""

    seeds: tuple[int, ...] = (0,)
    """Each point is run once with each seed."""

    trials: int | None = Field(default=None, ge=1)
    """Largest number of trials; with ranges, the number that is sampled, which is 8 by default."""

    grace: int = Field(default=10, ge=1)
    """Number of steps before a trial can be stopped: ASHA's first rung."""

    reduction: int = Field(default=2, ge=2)
    """ASHA keeps about one of this many trials at each rung; the rungs are this factor apart."""

    select_by: Literal["val_loss", "val_score"] = "val_loss"
    """The measure on the validation part that decides the winner."""

    executor: Literal["auto", "lane", "isolated"] = "auto"
    """`lane`: trials share a base in memory; `isolated`: a worker group for each; `auto`: lane if
    possible."""

    lanes: int = Field(default=1, ge=1)
    """Number of trials at the same time, each in a lane (or worker group) of `scale.workers` workers."""

    slots: Literal["auto"] | int = Field(default="auto", json_schema_extra={SINCE: "0.2"})
    """Number of trials of a lane that train as one batch, each on its own rows. `auto`: as many as make steps
    faster on a GPU, and 1 on CPUs. Trials whose method changes the base, or is one of PEFT's, take turns."""

    restarts: int = Field(default=3, ge=0)
    """How often a trial is tried again if its lane dies. A trial only fails when its lane dies with this
    trial alone; deaths with other trials since its last new evaluation then count too."""

    silence_seconds: float = Field(default=120.0, gt=0, json_schema_extra={SINCE: "0.2"})
    """Seconds without a sign of life or without a batch after which the user is notified."""

    hang_seconds: float = Field(default=1800.0, gt=0, json_schema_extra={SINCE: "0.2"})
    """Seconds of the same after which the lane's processes are killed and started again."""

    @property
    def patience(self) -> Patience:
        """How long a lane may send no sign of life, or compute nothing."""
        return Patience(self.silence_seconds, self.hang_seconds)

    @field_validator("methods")
    @classmethod
    def _methods_known(cls, value: dict[str, MethodSpace]) -> dict[str, MethodSpace]:
        if not value:
            raise ValueError("name at least one method")
        for name in value:
            try:
                method(name)
            except MethodError as error:
                raise ValueError(str(error)) from error
        return value

    @field_validator("slots")
    @classmethod
    def _slots_there(cls, value: Literal["auto"] | int) -> Literal["auto"] | int:
        if value != "auto" and value < 1:
            raise ValueError("needs at least one slot, or auto")
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds_there(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("needs at least one seed, none negative, none twice")
        return value


@dataclass(frozen=True)
class Point:
    """A trial to run. Its key stays the same when the sweep is started again."""

    key: str
    name: str
    run: RunConfig


def points(sweep: SweepConfig, run: RunConfig) -> list[Point]:
    """List the trials of a sweep; the methods alternate, so that a cap on the trials treats them alike.

    Args:
        sweep: the search space.
        run: the settings that all trials share, settled.

    Raises:
        ConfigError: if the cap is too small for one trial of each method.
    """
    families = [_family(name, space, sweep, run) for name, space in sweep.methods.items()]
    turns = [family[i] for i in range(max(map(len, families))) for family in families if i < len(family)]
    limit = sweep.trials if sweep.trials is not None else len(turns)
    if limit < len(families):
        raise ConfigError(
            f"sweep.trials is {limit}, but there are {len(families)} methods; allow at least one trial each"
        )
    return turns[:limit]


def check_distinct(trials: Sequence[Point]) -> None:
    """Check that trials have different names, by which they are scored, compared and reported.

    Raises:
        ConfigError: with a name that several have.
    """
    (name, count), *_ = Counter(point.name for point in trials).most_common(1)
    if count > 1:
        raise ConfigError(
            f"{count} trials have the name {name}: give each method, rank and learning rate once in "
            "sweep.methods, one rank to a method that ignores it, and learning rates that differ in their "
            "first six digits"
        )


def check_executor(sweep: SweepConfig, run: RunConfig) -> Literal["lane", "isolated"]:
    """Return the executor for a sweep.

    Raises:
        ConfigError: if the configuration asks for lanes and ZeRO-3 partitions the base.
    """
    partitioned = run.scale.zero == 3
    if sweep.executor == "lane" and partitioned:
        raise ConfigError("sweep.executor is lane, but ZeRO-3 partitions the base; use auto or isolated")
    if sweep.executor == "auto":
        return "isolated" if partitioned else "lane"
    return sweep.executor


def slots_asked(sweep: SweepConfig, scale: ScaleConfig) -> int | None:
    """Return the most trials that share the steps of a sweep's lanes; None if the lanes find that out."""
    if sweep.slots == "auto":
        return None if scale.device == "cuda" else 1
    return sweep.slots


def check_slots(
    sweep: SweepConfig, trials: Sequence[Point], model: nn.Module
) -> tuple[int | None, tuple[str, ...]]:
    """Return the most trials that share a lane's steps, and what a person should know about that.

    Args:
        sweep: the search's settings.
        trials: its trials.
        model: the base, whose weights need not be loaded.

    Returns:
        None if the lanes find out how many are fastest.

    Raises:
        ConfigError: if the configuration asks for slots, and no trials can share a batch.
    """
    run = trials[0].run
    lanes = check_executor(sweep, run) == "lane"
    if sweep.slots == "auto":
        return (slots_asked(sweep, run.scale) if lanes else 1), ()
    if sweep.slots == 1:
        return 1, ()
    alone = {trial.name: reason for trial in trials if (reason := why_alone(trial.run))}
    if len(alone) == len(trials):
        refusal = next(iter(alone.values()))
    elif not lanes:
        refusal = "executor: isolated gives each trial workers of its own"
    else:
        refusal = unpackable(model)
    if refusal:
        raise ConfigError(
            f"sweep.slots is {sweep.slots}, but trials can't share a batch: {refusal}; drop slots"
        )
    if not alone:
        return sweep.slots, ()
    name, reason = next(iter(alone.items()))
    return sweep.slots, (f"{len(alone)} of {len(trials)} trials take turns, such as {name}: {reason}",)


def _family(name: str, space: MethodSpace, sweep: SweepConfig, run: RunConfig) -> list[Point]:
    if isinstance(space.lr, tuple):
        pairs = [(rank, lr) for lr in space.lr for rank in space.ranks]
    else:
        share = math.ceil((sweep.trials or 8) / len(sweep.methods) / len(sweep.seeds))
        pairs = _drawn(name, space.ranks, space.lr, share, run.seed)
    own = MethodSpace.model_fields.keys() - {"ranks", "lr", "anneal"}
    shared = {field: getattr(space, field) for field in own}
    with config_errors(f"sweep.methods.{name}: "):
        configs = {rank: MethodConfig(name=name, rank=rank, **shared) for rank in space.ranks}
    return [_point(configs[rank], space.anneal, lr, seed, run) for seed in sweep.seeds for rank, lr in pairs]


def _drawn(name: str, ranks: Sequence[int], lr: LogUniform, count: int, seed: int) -> list[tuple[int, float]]:
    """Draw a learning rate for each of the ranks in turn; return pairs of both, none of them twice.

    Raises:
        ConfigError: if the range has too few learning rates.
    """
    draw = random.Random(derive_seed(seed, name))
    low, high = math.log(lr.low), math.log(lr.high)
    found: dict[tuple[int, float], None] = {}
    waiting = [ranks[i % len(ranks)] for i in range(count)]
    for _ in range(DRAWS):
        twice = []
        for rank in waiting:
            pair = rank, float(f"{math.exp(draw.uniform(low, high)):.3g}")
            if pair in found:
                twice.append(rank)
            found[pair] = None
        waiting = twice
        if not waiting:
            return [*found]
    raise ConfigError(
        f"sweep.methods.{name}.lr: from {lr.low:g} to {lr.high:g} there are too few learning rates of three "
        f"digits for {count} trials; widen the range, or lower sweep.trials"
    )


def _point(config: MethodConfig, anneal: AnnealConfig | None, lr: float, seed: int, run: RunConfig) -> Point:
    optim = run.optim.model_copy(update={"lr": lr})
    # Built anew, not copied, because settings that don't fit together must be found before anything starts.
    whole = _checked(run, {"method": config, "anneal": anneal, "optim": optim, "seed": seed})
    config = whole.method
    rank = method(config.name).rank(config)
    size = "" if rank is None else f"-r{rank}"
    size += f"to{anneal.rank}" if anneal else ""
    name = f"{config.name}{size}-lr{lr:g}-s{seed}"
    return Point(key=f"{name}-{whole.hash[:6]}", name=name, run=whole)


def _checked(run: RunConfig, changes: dict[str, object]) -> RunConfig:
    sections = {name: getattr(run, name) for name in RunConfig.model_fields}
    with config_errors():
        return RunConfig(**{**sections, **changes})

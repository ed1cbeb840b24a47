"""The phases of a run: spans of steps, each trained with an engine of its own, one after the other.

Most runs have one phase. A chain has a phase for each link. An annealed run has a phase for each rank:
between two phases, the optimizer's state is read from one engine, brought to the next rank and set in the
next engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from rayft.data.loader import RowStream
from rayft.errors import ConfigError
from rayft.methods.base import LoraFactors
from rayft.models.inject import advance, factors_of, refit
from rayft.squeeze.anneal import AnnealConfig, Moments, Phase, carry, lower_rank
from rayft.train.deepspeed import DeepSpeedEngine, gathered, kept
from rayft.train.masters import Master, read_masters, write_masters
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.worker import Worker

__all__ = ["Annealing", "Chain", "Phases", "link_steps", "phases_of"]


class Phases:
    """The one phase of a plain run, and the contract of runs with several phases."""

    def __init__(self, plan: Sequence[Phase]) -> None:
        self.plan = plan

    def skip(self, model: nn.Module, phase: int) -> None:
        """Prepare the model for a phase without training the one before; a checkpoint fills in the values."""

    def leave(self, engine: DeepSpeedEngine, model: nn.Module, phase: int) -> None:
        """Prepare the model for the next phase, while the engine of the last one exists (on all workers)."""

    def enter(self, engine: DeepSpeedEngine) -> None:
        """Set in a new engine the state that `leave` kept of the last one."""


class Chain(Phases):
    """Links: each phase freezes the trained link and begins a new one, with a new optimizer."""

    def __init__(self, plan: Sequence[Phase], run: RunConfig) -> None:
        super().__init__(plan)
        self._run = run

    def skip(self, model: nn.Module, phase: int) -> None:
        """Begin the link."""
        advance(model, self._run.seed, phase)

    def leave(self, engine: DeepSpeedEngine, model: nn.Module, phase: int) -> None:
        """Begin the link; this needs whole weights, which ZeRO-3 gathers."""
        with gathered(engine, kept(model).values()):
            advance(model, self._run.seed, phase)


class Annealing(Phases):
    """Falling ranks: weights continue in float32, and with `moments: project` Adam's state continues too.

    With `moments: reset` Adam's state begins anew, that of heads included, because ZeRO has one step count
    for all parameters of a group.
    """

    def __init__(self, plan: Sequence[Phase], config: AnnealConfig, worker: Worker) -> None:
        super().__init__(plan)
        self._config, self._worker = config, worker
        self._kept: dict[str, Master] = {}

    def skip(self, model: nn.Module, phase: int) -> None:
        """Cut the factors to the phase's rank; a checkpoint fills in their values."""
        rank, found = self.plan[phase].rank, factors_of(model)
        refit(model, {name: LoraFactors(f.a[:rank], f.b[:, :rank], f.scale) for name, f in found.items()})

    def leave(self, engine: DeepSpeedEngine, model: nn.Module, phase: int) -> None:
        """Read the engine's state, and reduce each module of a higher rank to the phase's rank."""
        self._kept, rank, fitted = read_masters(engine), self.plan[phase].rank, {}
        for name, factors in factors_of(model).items():
            if factors.rank > rank:
                fitted[name] = self._lower(name, factors.scale, rank)
        refit(model, fitted)
        if self._config.moments == "reset":
            self._kept = {name: Master(master.weight, None) for name, master in self._kept.items()}

    def enter(self, engine: DeepSpeedEngine) -> None:
        """Set weights and moments."""
        if self._kept:
            write_masters(engine, self._kept)
        self._kept = {}

    def _lower(self, module: str, scale: float, rank: int) -> LoraFactors:
        """Reduce a module's rank in `_kept`, to the same values on all workers; return its factors."""
        name_a, name_b = f"{module}.adapter.lora_A", f"{module}.adapter.lora_B"
        a, b, same = self._kept[name_a], self._kept[name_b], self._worker.same
        change = lower_rank(LoraFactors(a.weight, b.weight, scale), rank)
        for_a = for_b = None
        if a.moments and b.moments:
            for_a, for_b = (
                Moments(same(moments.mean), same(moments.square))
                for moments in carry(change, a.moments, b.moments)
            )
        a = replace(a, weight=same(change.factors.a), moments=for_a)
        b = replace(b, weight=same(change.factors.b), moments=for_b)
        self._kept |= {name_a: a, name_b: b}
        return LoraFactors(a.weight, b.weight, scale)


def phases_of(run: RunConfig, session: Session) -> Phases:
    """Divide a run into its phases.

    Raises:
        ConfigError: if one of them would have no steps.
    """
    optim = run.optim
    if run.anneal is not None:
        plan = run.anneal.plan(run.method.rank, optim.steps, optim.warmup)
        return Annealing(plan, run.anneal, session.worker)
    plan = [
        Phase(*steps, optim.warmup, run.method.rank) for steps in link_steps(run, session.row_stream(run))
    ]
    return Chain(plan, run) if run.method.chain else Phases(plan)


def link_steps(run: RunConfig, rows: RowStream) -> list[tuple[int, int]]:
    """Return the steps of each link as (first, end), counted from 0, `end` excluded.

    A method that is no chain has one link.

    Args:
        run: the run.
        rows: the rows that it trains on, which decide at which step an epoch begins.

    Raises:
        ConfigError: if a link would begin after the last step, have no step of its own, or end before its
            learning rate has warmed up.
    """
    steps, chain = run.optim.steps, run.method.chain
    if chain is None:
        return [(0, steps)]
    if chain.epochs is None:
        size = steps // chain.links
        return [(link * size, (link + 1) * size) for link in range(chain.links)]
    starts = [rows.first_step(link * chain.epochs) for link in range(chain.links)]
    if starts[-1] >= steps:
        raise ConfigError(
            f"link {chain.links} of '{run.method.name}' would begin at step {starts[-1] + 1} of {steps}: "
            f"raise optim.steps to {rows.first_step(chain.links * chain.epochs)}, or take fewer links or "
            "epochs"
        )
    if len(set(starts)) < len(starts):
        raise ConfigError(
            f"{chain.epochs} epochs are less than one step of {run.optim.rows_per_step} rows, so a link of "
            f"'{run.method.name}' would not train: raise method.chain.epochs, or lower optim.rows_per_step"
        )
    links = list(zip(starts, [*starts[1:], steps], strict=True))
    shortest = min(end - first for first, end in links)
    # Links by steps are checked with the settings.
    if shortest < run.optim.warmup:
        raise ConfigError(
            f"optim.warmup ({run.optim.warmup}) must be at most the {shortest} steps of the shortest link of "
            f"'{run.method.name}', or its learning rate never reaches {run.optim.lr:g}: take {shortest} or "
            "less"
        )
    return links

"""A run's stages: each is trained by an engine of its own, one after the other.

What is neither a chain nor annealed has one. A chain has a stage for each link. An annealed run has one for
each rank: what the optimizer of one stage holds is read, brought to the next rank and set in the next engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from rayft.methods.base import LoraFactors
from rayft.models.inject import advance, factors_of, refit
from rayft.squeeze.anneal import AnnealConfig, Moments, Phase, carry, lower_rank
from rayft.train.context import Session, Worker
from rayft.train.deepspeed import Engine, gathered, kept
from rayft.train.links import spans
from rayft.train.masters import Master, read_masters, write_masters
from rayft.train.run import RunConfig

__all__ = ["Annealing", "Chain", "Stages", "stages"]


class Stages:
    """A run of one stage, and the contract of those with more."""

    def __init__(self, plan: Sequence[Phase]) -> None:
        self.plan = plan

    def skip(self, model: nn.Module, stage: int) -> None:
        """Bring the model from the stage before to a stage whose numbers come from a checkpoint."""

    def leave(self, engine: Engine, model: nn.Module, stage: int) -> None:
        """Bring the model to a stage while the engine of the one before still holds it (on all workers)."""

    def enter(self, engine: Engine) -> None:
        """Set in the new engine what `leave` kept of the last one."""


class Chain(Stages):
    """Links: the trained one is frozen, and a fresh one begins with a fresh optimizer."""

    def __init__(self, plan: Sequence[Phase], run: RunConfig) -> None:
        super().__init__(plan)
        self._run = run

    def skip(self, model: nn.Module, stage: int) -> None:
        """Begin the link."""
        advance(model, self._run.seed, stage)

    def leave(self, engine: Engine, model: nn.Module, stage: int) -> None:
        """Begin the link, from whole weights."""
        with gathered(engine, kept(model).values()):
            advance(model, self._run.seed, stage)


class Annealing(Stages):
    """Falling ranks: weights go on in float32, and with `moments: project` Adam's state goes on too.

    With `moments: reset` it begins anew, that of heads included: ZeRO counts Adam's steps once for all
    parameters of a group.
    """

    def __init__(self, plan: Sequence[Phase], config: AnnealConfig, worker: Worker) -> None:
        super().__init__(plan)
        self._config, self._worker = config, worker
        self._kept: dict[str, Master] = {}

    def skip(self, model: nn.Module, stage: int) -> None:
        """Bring the factors to the rank; a checkpoint fills them."""
        rank, found = self.plan[stage].rank, factors_of(model)
        refit(model, {name: LoraFactors(f.a[:rank], f.b[:, :rank], f.scale) for name, f in found.items()})

    def leave(self, engine: Engine, model: nn.Module, stage: int) -> None:
        """Read what the engine holds, and bring each module that is above the rank to it."""
        self._kept, rank, fitted = read_masters(engine), self.plan[stage].rank, {}
        for name, factors in factors_of(model).items():
            if factors.rank > rank:
                fitted[name] = self._lower(name, factors.scale, rank)
        refit(model, fitted)
        if self._config.moments == "reset":
            self._kept = {name: Master(master.weight, None) for name, master in self._kept.items()}

    def enter(self, engine: Engine) -> None:
        """Set weights and moments."""
        if self._kept:
            write_masters(engine, self._kept)
        self._kept = {}

    def _lower(self, module: str, scale: float, rank: int) -> LoraFactors:
        """Bring a module to a rank in `_kept`, on all workers to the same numbers; give its factors."""
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


def stages(run: RunConfig, session: Session) -> Stages:
    """Divide a run into its stages.

    Raises:
        ConfigError: if one of them would have no steps.
    """
    optim = run.optim
    if run.anneal is not None:
        plan = run.anneal.plan(run.method.rank, optim.steps, optim.warmup)
        return Annealing(plan, run.anneal, session.worker)
    plan = [Phase(*span, optim.warmup, run.method.rank) for span in spans(run, session.schedule(run))]
    return Chain(plan, run) if run.method.chain else Stages(plan)

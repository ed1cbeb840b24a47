"""In-Squeeze: the rank falls during training. LoRA-Squeeze, Vulić et al. 2026, arXiv:2602.10993.

A run trains at ranks r_0 > r_1 > … > r_n, each for a part of its steps. Between two of them ΔW = s·B·A is
cut to its best approximation of the next rank (`factored_svd`), the scale s kept, as at a squeeze after
training:

    ΔW = u·diag(S)·vᵀ        B' = u √(S/s)  (O × K)        A' = √(S/s) vᵀ  (K × I)        the first K columns

Both are linear in what they replace, A' = P_A A and B' = B P_B. Of all such maps these need no inverse:

    P_A = √(s/S) uᵀ B  (K × R)        for  uᵀ (B A) = uᵀ ΔW / s = (S/s) vᵀ
    P_B = A v √(s/S)   (R × K)        for  (B A) v = ΔW v / s = u (S/s)

Gradients are covectors. With G = dL/dW, dL/dB = s·G Aᵀ and dL/dA = s·Bᵀ G, so at the same G

    dL/dB' = s·G A'ᵀ = dL/dB · P_Aᵀ        dL/dA' = s·B'ᵀ G = P_Bᵀ · dL/dA

which maps Adam's first moment, a mean of gradients, exactly. The second is a mean of squares, of which
the entries alone are kept: with the entries of the map squared it is right where gradients of different
columns are uncorrelated, and never negative.

Dead columns: where ΔW has a lower rank than K, S = 0 would make a row of A' and a column of B' zero
together, and their gradients with them, for ever. Such a row is v's direction with the median norm of the
living rows instead, with B' = 0: ΔW is the same, and the column can learn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from pydantic import Field, model_validator

from rayft.config import Section
from rayft.errors import ConfigError
from rayft.methods.base import LoraFactors
from rayft.numerics import generator
from rayft.squeeze.factored_svd import factored_svd, sorted_factors

__all__ = ["AnnealConfig", "LowerRank", "Moments", "Phase", "carry", "lower_rank", "revive"]


@dataclass(frozen=True)
class Phase:
    """A part of a run with an engine of its own: steps `first` to `end` (excluded), counted from 0."""

    first: int
    end: int
    warmup: int
    """Steps of linear warm-up at its start."""
    rank: int
    """Rank that it trains at."""


class AnnealConfig(Section):
    """Ranks that a run falls through while it trains, from `method.rank` to a lower one."""

    rank: int = Field(ge=1)
    """Rank at the end; modules that have a lower one by `rank_pattern` keep it."""

    stages: int | None = Field(default=None, ge=2)
    """Ranks that are trained, the first and the last among them; as many as halving takes where not given."""

    schedule: Literal["geometric", "linear"] = "geometric"
    """Ranks fall by equal factors, or by equal differences."""

    ranks: tuple[int, ...] | None = None
    """The ranks after `method.rank` one by one, ending with `rank`; instead of `stages` and `schedule`."""

    steps: Literal["equal", "by_rank"] = "equal"
    """A stage's share of `optim.steps`: the same for all, or in proportion to its rank."""

    moments: Literal["project", "reset"] = "project"
    """What becomes of Adam's moments between two stages: carried to the new factors, or begun anew."""

    warmup: int | None = Field(default=None, ge=0)
    """Warm-up steps of each later stage; where not given, 0 with projected moments, else `optim.warmup`."""

    @model_validator(mode="after")
    def _ranks_fall(self) -> AnnealConfig:
        if self.ranks is None:
            return self
        if self.stages is not None or self.schedule != "geometric":
            raise ValueError("ranks stand in the place of stages and schedule; drop those, or drop ranks")
        if not self.ranks or self.ranks[-1] != self.rank:
            raise ValueError(f"ranks must end with rank ({self.rank}), and are {list(self.ranks)}")
        if any(one <= other for one, other in pairwise(self.ranks)):
            raise ValueError(f"ranks must fall from one to the next, and are {list(self.ranks)}")
        return self

    def ranks_from(self, source: int) -> tuple[int, ...]:
        """List the ranks that are trained, `source` first.

        Raises:
            ConfigError: if they would not fall from one to the next.
        """
        first = self.rank if self.ranks is None else self.ranks[0]
        if first >= source:
            raise ConfigError(
                f"anneal goes to rank {first}, which is not below method.rank ({source}): raise method.rank, "
                "or lower what anneal goes to"
            )
        if self.ranks is not None:
            return (source, *self.ranks)
        count = self.stages or max(2, round(math.log2(source / self.rank)) + 1)
        shares = [stage / (count - 1) for stage in range(count)]
        if self.schedule == "geometric":
            found = tuple(round(source * (self.rank / source) ** share) for share in shares)
        else:
            found = tuple(round(source + (self.rank - source) * share) for share in shares)
        if any(one <= other for one, other in pairwise(found)):
            raise ConfigError(
                f"anneal.stages: {count} from rank {source} to {self.rank} come out as "
                f"{', '.join(map(str, found))}, some of them twice: take fewer stages, or give anneal.ranks"
            )
        return found

    def plan(self, source: int, steps: int, warmup: int) -> list[Phase]:
        """Share a run's steps out over its ranks.

        Args:
            source: the rank that the run begins at.
            steps: its optimizer steps.
            warmup: its own warm-up steps, those of the first stage.

        Raises:
            ConfigError: if ranks don't fall, or a stage is shorter than a step or than its warm-up.
        """
        ranks = self.ranks_from(source)
        weights = ranks if self.steps == "by_rank" else (1,) * len(ranks)
        ends = [round(steps * done / sum(weights)) for done in accumulate(weights)]
        later = self.warmup if self.warmup is not None else warmup if self.moments == "reset" else 0
        warmups = [warmup, *[later] * (len(ranks) - 1)]
        found = [Phase(*each) for each in zip([0, *ends[:-1]], ends, warmups, ranks, strict=True)]
        for phase in found:
            length, knob = phase.end - phase.first, "optim.warmup" if phase.first == 0 else "anneal.warmup"
            if length < max(1, phase.warmup):
                least = f"its warm-up of {phase.warmup}" if length else "one"
                lower = f", lower {knob}" if length else ""
                raise ConfigError(
                    f"of optim.steps ({steps}) the phase of rank {phase.rank} gets {length}, fewer than "
                    f"{least}: raise optim.steps, take fewer anneal.stages{lower}"
                )
        return found


@dataclass(frozen=True)
class Moments:
    """Adam's state of one parameter, in its shape."""

    mean: torch.Tensor
    """First moment, `exp_avg`."""
    square: torch.Tensor
    """Second moment, `exp_avg_sq`."""


@dataclass(frozen=True)
class LowerRank:
    """Factors of rank K that came from factors of rank R, and the maps between them (float64)."""

    factors: LoraFactors
    p_a: torch.Tensor
    """A' = P_A A (K × R); rows of dead columns are 0."""
    p_b: torch.Tensor
    """B' = B P_B (R × K); columns of dead columns are 0."""
    alive: torch.Tensor
    """Which of the K columns hold a part of ΔW."""


def lower_rank(factors: LoraFactors, rank: int) -> LowerRank:
    """Bring factors to a rank of at most their own, the scale kept; ΔW becomes its best approximation.

    Computed in float64; the factors keep their dtype.
    """
    assert 1 <= rank <= factors.rank, "a rank only falls"
    svd = factored_svd(factors)
    s, u, v = svd.s[:rank], svd.u[:, :rank], svd.v[:, :rank]
    best = sorted_factors(svd, factors.scale, torch.float64)
    # What is below is the rounding of float32 factors, and no part of the update.
    alive = s > svd.s[0] * factors.rank * torch.finfo(torch.float32).eps
    root = torch.where(alive, (factors.scale / s).sqrt(), 0.0)
    norm = _usual_norm(best.a[:rank][alive] if alive.any() else factors.a.double())
    a = torch.where(alive[:, None], best.a[:rank], norm * v.t())
    b = torch.where(alive, best.b[:, :rank], 0.0)
    dtype = factors.a.dtype
    return LowerRank(
        factors=LoraFactors(a.to(dtype).contiguous(), b.to(dtype).contiguous(), factors.scale),
        p_a=root[:, None] * (u.t() @ factors.b.double()),
        p_b=(factors.a.double() @ v) * root,
        alive=alive,
    )


def carry(change: LowerRank, a: Moments, b: Moments) -> tuple[Moments, Moments]:
    """Map Adam's moments of A (R × I) and B (O × R) to those of A' and B'; their dtype is kept.

    A dead column has no gradients to tell of. Its second moment is the mean of the living ones, since from
    zero, with bias correction long past, Adam's first steps there would be 1/√(1 − β₂) too long.
    """
    p_a, p_b, alive = change.p_a, change.p_b, change.alive
    square_a = p_b.square().t() @ a.square.double()
    square_b = b.square.double() @ p_a.square().t()
    if alive.any():
        square_a[~alive] = square_a[alive].mean(0)
        square_b[:, ~alive] = square_b[:, alive].mean(1, keepdim=True)
    dtype = a.mean.dtype
    return (
        Moments((p_b.t() @ a.mean.double()).to(dtype), square_a.to(dtype)),
        Moments((b.mean.double() @ p_a.t()).to(dtype), square_b.to(dtype)),
    )


def revive(factors: LoraFactors) -> LoraFactors:
    """Give columns that are zero in A and B alike a row of A; ΔW and the other columns stay as they are.

    The rows are random directions, orthogonal to each other and to the living rows, with their median
    norm. What has no such column comes back itself. The rank must be at most the inputs.
    """
    dead = ~(factors.a.any(1) | factors.b.any(0))
    if not dead.any():
        return factors
    living, count = factors.a[~dead].double(), int(dead.sum())
    draw = torch.randn(count, factors.a.shape[1], generator=generator("revive", count), dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.cat([living, draw.to(living.device)]).t())
    a = factors.a.double().clone()
    a[dead] = _usual_norm(living) * q[:, len(living) :].t()
    return LoraFactors(a.to(factors.a.dtype), factors.b, factors.scale)


def _usual_norm(rows: torch.Tensor) -> float:
    """Give the median norm of rows that are not zero; of none, that of a Kaiming-uniform row of A."""
    norms = rows.norm(dim=1)
    norms = norms[norms > 0]
    return float(norms.median()) if len(norms) else 1 / math.sqrt(3)

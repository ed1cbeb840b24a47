"""In-Squeeze: the rank falls during training. LoRA-Squeeze, Vulić et al. 2026, arXiv:2602.10993.

A run trains at ranks r_0 > r_1 > … > r_n, each for a phase of its steps. Between two phases ΔW = s·B·A is
truncated to its best approximation of the next rank (`factored_svd`) with the scale s kept, as in a squeeze
after training:

    ΔW = u·diag(S)·vᵀ        B' = u √(S/s)  (O × K)        A' = √(S/s) vᵀ  (K × I)        the first K columns

Both are linear in the factors that they replace, A' = P_A A and B' = B P_B. Of all such maps these need no
inverse:

    P_A = √(s/S) uᵀ B  (K × R)        for  uᵀ (B A) = uᵀ ΔW / s = (S/s) vᵀ
    P_B = A v √(s/S)   (R × K)        for  (B A) v = ΔW v / s = u (S/s)

Gradients are covectors. With G = dL/dW, dL/dB = s·G Aᵀ and dL/dA = s·Bᵀ G, so at the same G

    dL/dB' = s·G A'ᵀ = dL/dB · P_Aᵀ        dL/dA' = s·B'ᵀ G = P_Bᵀ · dL/dA

which maps Adam's first moment, a mean of gradients, exactly. The second moment is a mean of the squares of
the entries, without their products: mapped with the squares of the map's entries it is right if the gradients
of different columns are uncorrelated, and it is never negative.

Dead columns: if ΔW has a lower rank than K, S = 0 would make a row of A' and the column of B' zero, and their
gradients too, for ever. Instead such a row gets the direction of v with the median norm of the living rows,
and B' = 0: ΔW is the same, and the column can learn.
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
    """A span of a run with an engine of its own: steps `first` to `end` (excluded), counted from 0."""

    first: int
    end: int
    warmup: int
    """Steps of linear warm-up at the start of the phase."""
    rank: int
    """Rank at which the phase trains."""


class AnnealConfig(Section):
    """The ranks of a run that starts at `method.rank` and ends at a lower one."""

    rank: int = Field(ge=1)
    """Rank at the end; modules with a lower one by `rank_pattern` keep theirs."""

    stages: int | None = Field(default=None, ge=2)
    """Number of phases, each at a rank of its own; as many as halving takes if not given."""

    schedule: Literal["geometric", "linear"] = "geometric"
    """Ranks fall by equal factors, or by equal differences."""

    ranks: tuple[int, ...] | None = None
    """The ranks after `method.rank` one by one, ending with `rank`; instead of `stages` and `schedule`."""

    steps: Literal["equal", "by_rank"] = "equal"
    """Each phase's share of `optim.steps`: equal shares, or in proportion to its rank."""

    moments: Literal["project", "reset"] = "project"
    """Whether Adam's moments are mapped to the new factors between two phases, or start again at zero."""

    warmup: int | None = Field(default=None, ge=0)
    """Warm-up steps of each later phase; if not given, 0 with projected moments, else `optim.warmup`."""

    @model_validator(mode="after")
    def _ranks_fall(self) -> AnnealConfig:
        if self.ranks is None:
            return self
        if self.stages is not None or self.schedule != "geometric":
            raise ValueError("ranks replace stages and schedule; leave those out, or leave ranks out")
        if not self.ranks or self.ranks[-1] != self.rank:
            raise ValueError(f"ranks must end with rank ({self.rank}), and are {list(self.ranks)}")
        if any(one <= other for one, other in pairwise(self.ranks)):
            raise ValueError(f"ranks must fall from one to the next, and are {list(self.ranks)}")
        return self

    def ranks_from(self, source: int) -> tuple[int, ...]:
        """Return the rank of each phase, `source` first.

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
        """Divide a run's steps into phases.

        Args:
            source: the rank that the run begins at.
            steps: its optimizer steps.
            warmup: its own warm-up steps, which are those of the first phase.

        Raises:
            ConfigError: if ranks don't fall, or a phase is shorter than a step or than its warm-up.
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
    """Truncate factors to at most their own rank, with the scale kept; ΔW becomes its best approximation.

    Computed in float64; the factors keep their dtype.
    """
    assert 1 <= rank <= factors.rank, "a rank only falls"
    svd = factored_svd(factors)
    s, u, v = svd.s[:rank], svd.u[:, :rank], svd.v[:, :rank]
    best = sorted_factors(svd, factors.scale, torch.float64)
    # Smaller values are the rounding of float32 factors and no part of the update.
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

    A dead column has had no gradients. Its second moment becomes the mean of the living ones: from zero, long
    after bias correction, Adam's first steps there would be too long by 1/√(1 − β₂).
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
    """Replace the rows of A of columns that are zero in both A and B; ΔW and other columns stay the same.

    The new rows are random directions, orthogonal to each other and to the living rows, with the median norm
    of the living rows. Factors without such a column are returned unchanged. The rank must not exceed the
    number of inputs.
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
    """Return the median norm of the nonzero rows; without any, that of a Kaiming-uniform row of A."""
    norms = rows.norm(dim=1)
    norms = norms[norms > 0]
    return float(norms.median()) if len(norms) else 1 / math.sqrt(3)

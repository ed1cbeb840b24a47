"""Squeezing an adapter, and how far: by rank or by retained energy.

Retained energy of a module at rank k is Σ_{i≤k} σᵢ² / Σ σᵢ²: the share of ‖ΔW‖² that survives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field, field_validator

from rayft.artifacts import AdapterArtifact
from rayft.config import Section
from rayft.errors import SqueezeError
from rayft.methods.base import LoraFactors
from rayft.squeeze.factored_svd import factored_svd, sorted_factors

__all__ = ["SqueezeConfig", "rank_for_energy", "retained_energy", "squeeze"]


class SqueezeConfig(Section):
    """To which ranks a sweep's winner is brought, and when the smaller one is good enough."""

    ranks: tuple[int, ...] = (8, 4, 2)
    """Ranks to make and score; those not below the winner's rank are left out."""

    energy: float | None = Field(default=None, gt=0, le=1)
    """Also squeeze each module to the rank that retains this share of its energy."""

    keep_score: float = Field(default=0.98, ge=0, le=1)
    """A rank is good enough if it keeps this share of the winner's validation score."""

    @field_validator("ranks")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        wrong = [rank for rank in value if rank < 1]
        if wrong:
            raise ValueError(f"{wrong[0]} is no rank; ranks start at 1")
        return tuple(sorted(set(value), reverse=True))


def squeeze(
    artifact: AdapterArtifact, *, rank: int | None = None, energy: float | None = None
) -> AdapterArtifact:
    """Bring an adapter to a lower rank, exactly.

    Computed at full rank and then sliced, so `squeeze(a, rank=k)` is `squeeze(a).at_rank(k)`. With
    neither rank nor energy, only the columns are sorted: the update stays the same.

    Args:
        artifact: any adapter; its factors' dtype is kept.
        rank: the same for all modules (those of a lower rank keep theirs).
        energy: each module to the smallest rank that retains this share (0 < energy ≤ 1).

    Raises:
        SqueezeError: if both are given, or one is out of its range.
    """
    _check_request(artifact, rank, energy)
    if artifact.squeezed:
        full = artifact
    else:
        modules, spectra = {}, {}
        for name, factors in artifact.modules.items():
            svd = factored_svd(factors)
            modules[name] = sorted_factors(svd, factors.scale, factors.a.dtype)
            spectra[name] = tuple(svd.s.tolist())
        meta = artifact.meta.model_copy(
            update={"singular_values": spectra, "parent": artifact.content_hash, "columns": {}}
        )
        full = replace(artifact, modules=modules, meta=meta)
    if energy is not None:
        return _at_ranks(full, {n: rank_for_energy(s, energy) for n, s in full.meta.singular_values.items()})
    return full if rank is None else full.at_rank(rank)


def rank_for_energy(singular_values: tuple[float, ...], energy: float) -> int:
    """Give the smallest rank (at least 1) that retains a share of the energy."""
    squares = torch.tensor(singular_values, dtype=torch.float64).square()
    if not float(squares.sum()):
        return 1
    share = squares.cumsum(0) / squares.sum()
    # A sum in float64 may end a rounding below 1: energy 1.0 then means all.
    return min(int((share < energy - 1e-12).sum()) + 1, len(singular_values))


def retained_energy(artifact: AdapterArtifact) -> dict[str, float]:
    """Give each module's retained energy at its present rank, from the spectrum of a squeeze.

    Raises:
        SqueezeError: if the adapter was never squeezed.
    """
    if not artifact.squeezed:
        raise SqueezeError("the adapter has no spectrum; squeeze it first")
    retained = {}
    for name, factors in artifact.modules.items():
        squares = [value * value for value in artifact.meta.singular_values[name]]
        total = sum(squares)
        retained[name] = sum(squares[: factors.rank]) / total if total else 1.0
    return retained


def _at_ranks(artifact: AdapterArtifact, ranks: Mapping[str, int]) -> AdapterArtifact:
    modules = {
        name: LoraFactors(f.a[: ranks[name]], f.b[:, : ranks[name]], f.scale)
        for name, f in artifact.modules.items()
    }
    return replace(artifact, modules=modules)


def _check_request(artifact: AdapterArtifact, rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise SqueezeError("give a rank or an energy, not both")
    if rank is not None and (rank < 1 or rank > artifact.rank):
        raise SqueezeError(f"rank {rank} is not between 1 and the adapter's own rank, {artifact.rank}")
    if energy is not None and not 0 < energy <= 1:
        raise SqueezeError(f"energy {energy} is not in (0, 1]; 0.95 keeps 95% of the update's energy")

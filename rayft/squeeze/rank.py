"""Squeeze an adapter to a rank, to a share of its energy, or to a budget of bytes.

Retained energy of a module at rank k is Σ_{i≤k} σᵢ² / Σ σᵢ²: the share of ‖ΔW‖² that survives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import SqueezeError
from rayft.methods.base import LoraFactors
from rayft.squeeze.budget import ranks_for_budget, weight_bytes
from rayft.squeeze.factored_svd import factored_svds, sorted_factors, stacks

__all__ = ["Progress", "at_ranks", "rank_for_energy", "retained_energy", "squeeze"]

Progress = Callable[[int], None]
"""Called with the number of modules finished since the last call."""


def squeeze(
    artifact: AdapterArtifact,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> AdapterArtifact:
    """Bring an adapter to a lower rank by an exact SVD.

    The SVD is computed at full rank and then sliced, so `squeeze(a, rank=k)` equals `squeeze(a).at_rank(k)`.
    Without a target the columns are sorted and the update stays the same. Besides the source and the result,
    memory holds one module in float64 (on a GPU a stack of at most 256 MiB).

    Args:
        artifact: any adapter; its factors' dtype and device are kept.
        rank: the rank of all modules (those of a lower rank keep theirs).
        energy: each module gets the smallest rank that retains this share (0 < energy ≤ 1).
        budget: bytes that the file of weights may have; modules with large singular values get higher ranks.
        device: where to compute; the factors' own device if not given.
        progress: called after each module.

    Raises:
        SqueezeError: if more than one target is given, or the target can't be met.
        ArtifactError: if factors hold NaN or Inf, or make no adapter (`AdapterArtifact.check`).
    """
    _check_request(artifact, rank, energy, budget)
    full = artifact if artifact.squeezed else _sorted(artifact, device, progress)
    if energy is not None:
        return at_ranks(full, _ranks_for_energy(full, energy))
    if budget is not None:
        return at_ranks(full, _ranks_for_budget(full, budget))
    return full if rank is None else full.at_rank(rank)


def rank_for_energy(singular_values: Sequence[float], energy: float, tail: float = 0.0) -> int:
    """Return the smallest rank (at least 1) that retains a share of the energy.

    Args:
        singular_values: largest first.
        energy: the share, in (0, 1].
        tail: Σσ² of the values that are not listed. If the listed values don't retain the share, the result
            is one more than their number.
    """
    squares = torch.tensor(singular_values, dtype=torch.float64).square()
    total = float(squares.sum()) + tail
    if not total:
        return 1
    # A sum in float64 may end slightly below 1, so a share of 1.0 needs some slack.
    rank = int((squares.cumsum(0) / total < energy - 1e-12).sum()) + 1
    return rank if tail else min(rank, len(singular_values))


def retained_energy(artifact: AdapterArtifact) -> dict[str, float]:
    """Return each module's retained energy at its present rank, from the spectrum of a squeeze.

    Raises:
        SqueezeError: if the adapter was never squeezed.
    """
    if not artifact.squeezed:
        raise SqueezeError("the adapter has no spectrum; squeeze it first")
    retained = {}
    for name, factors in artifact.modules.items():
        squares = [value * value for value in artifact.meta.singular_values[name]]
        total = sum(squares) + artifact.meta.tail_energy.get(name, 0.0)
        retained[name] = sum(squares[: factors.rank]) / total if total else 1.0
    return retained


def at_ranks(artifact: AdapterArtifact, ranks: Mapping[str, int]) -> AdapterArtifact:
    """Return a squeezed adapter with a rank for each module, as views of the same numbers."""
    modules = {
        name: LoraFactors(f.a[: ranks[name]], f.b[:, : ranks[name]], f.scale)
        for name, f in artifact.modules.items()
    }
    return replace(artifact, modules=modules)


def _sorted(
    artifact: AdapterArtifact, device: str | torch.device | None, progress: Progress | None
) -> AdapterArtifact:
    artifact.check("it can't be squeezed")
    modules: dict[str, LoraFactors] = {}
    spectra: dict[str, tuple[float, ...]] = {}
    for names in stacks(artifact.modules, device):
        many = [artifact.modules[name] for name in names]
        moved = [f if device is None else f.to(device) for f in many]
        for name, source, svd in zip(names, many, factored_svds(moved), strict=True):
            found = sorted_factors(svd, source.scale, source.a.dtype)
            a, b = (new.to(source.a.device).contiguous() for new in (found.a, found.b))
            modules[name], spectra[name] = LoraFactors(a, b, source.scale), tuple(svd.s.tolist())
        if progress:
            progress(len(names))
    in_order = {name: modules[name] for name in artifact.modules}
    meta = artifact.meta.model_copy(
        update={"singular_values": spectra, "parent": artifact.content_hash, "columns": {}}
    )
    return replace(artifact, modules=in_order, meta=meta)


def _ranks_for_energy(full: AdapterArtifact, energy: float) -> dict[str, int]:
    ranks = {}
    for name, values in full.meta.singular_values.items():
        ranks[name] = rank_for_energy(values, energy, full.meta.tail_energy.get(name, 0.0))
        has = full.modules[name].rank
        if ranks[name] > has:
            keeps = retained_energy(full)[name]
            raise SqueezeError(
                f"{name} is at rank {has} already and retains {keeps:.4f} of its energy, less than the "
                f"{energy:g} asked for: squeeze the adapter that it was made from, or ask for at most "
                f"{_floor(keeps)}"
            )
    return ranks


def _floor(share: float) -> str:
    """Format a share rounded down."""
    return f"{int(share * 1e4) / 1e4:g}"


def _ranks_for_budget(full: AdapterArtifact, budget: int) -> dict[str, int]:
    spectra = {name: full.meta.singular_values[name][: f.rank] for name, f in full.modules.items()}
    costs = {
        name: f.a.element_size() * f.a.shape[1] + f.b.element_size() * f.b.shape[0]
        for name, f in full.modules.items()
    }
    # Bytes that are no factors: heads, and the file's header, which grows with the digits of the ranks.
    least = at_ranks(full, dict.fromkeys(spectra, 1))
    rest = weight_bytes(least) - sum(costs.values())
    if budget <= rest:
        raise SqueezeError(
            f"a budget of {budget:,} bytes is too small: heads and the file's header alone take {rest:,}"
        )
    while True:
        ranks = ranks_for_budget(spectra, costs, budget - rest)
        over = weight_bytes(at_ranks(full, ranks)) - budget
        if over <= 0:
            return ranks
        rest += over


def _check_request(
    artifact: AdapterArtifact, rank: int | None, energy: float | None, budget: int | None
) -> None:
    if sum(target is not None for target in (rank, energy, budget)) > 1:
        raise SqueezeError("give a rank, an energy or a budget: one of them")
    if rank is not None and (rank < 1 or rank > artifact.rank):
        raise SqueezeError(f"rank {rank} is not between 1 and the adapter's own rank, {artifact.rank}")
    if energy is not None and not 0 < energy <= 1:
        raise SqueezeError(f"energy {energy} is not in (0, 1]; 0.95 keeps 95% of the update's energy")
    if budget is not None and budget < 1:
        raise SqueezeError(f"a budget of {budget} bytes holds nothing; write one such as 1.5MB")
    idle = next((name for name, factors in artifact.modules.items() if factors.scale == 0), None)
    if idle is not None:
        raise SqueezeError(f"{idle} has scale 0 (lora_alpha is 0), so its update is nothing; export it again")

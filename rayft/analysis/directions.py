"""Directions along which a loss landscape is evaluated, in ΔW space. Li et al. 2018, arXiv:1712.09913.

A direction D (O × I for a module) is a direction of ΔW and not of A and B: the loss depends on ΔW alone,
so B → cB, A → A/c changes nothing. Random ones are Gaussian, each row scaled to the norm of ΔW's same
row, or of W0 + ΔW's (the paper's filter normalisation: a row is a linear layer's filter). Those of a
trajectory are the principal directions of {ΔW_t − ΔW_end} (sec. 7), from factors alone:

    ⟨B_s A_s, B_t A_t⟩ = tr((B_sᵀ B_t)(A_t A_sᵀ))          the Gram matrix, T × T, of products R × R

Shapes: R ranks of all points together, T points of a path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from rayft.analysis.section import Norm
from rayft.errors import DataError, MethodError
from rayft.methods.base import LoraFactors
from rayft.numerics import generator, tolerance
from rayft.squeeze.factored_svd import decomposed, sorted_factors

__all__ = ["Direction", "Trajectory", "random_directions", "trajectory_directions"]

Direction = Mapping[str, torch.Tensor | LoraFactors]
"""Module path → D (O × I), dense or in factors."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The plane through the end of a path of adapters that most of the path lies in."""

    directions: tuple[Direction, Direction]
    """Orthogonal, of Frobenius norm 1 over all modules; the first point's coordinates are not negative."""
    coordinates: torch.Tensor
    """(T, 2) float64: each point's, the end at (0, 0)."""
    explained: tuple[float, float]
    """Share of Σ_t ‖ΔW_t − ΔW_end‖² that lies along each."""


def random_directions(
    artifact_modules: Mapping[str, LoraFactors],
    count: int,
    seed: int,
    norm: Norm = "update",
    weights: Mapping[str, torch.Tensor] | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Draw Gaussian directions whose rows have the norms of ΔW's rows, or of those of W0 + ΔW.

    Each module draws from a generator of its own, seeded by (seed, module path, number of the direction).

    Args:
        artifact_modules: the adapter: module path → factors.
        count: how many.
        seed: decides them.
        norm: "update" for ΔW's rows, "weight" for those of W0 + ΔW.
        weights: W0 (O × I) of each module, for "weight" only (`AdapterLinear.matrix`).

    Returns:
        `count` directions, dense, in the dtype and on the device of the factors.

    Raises:
        MethodError: if "weight" is asked for and a module's weight isn't given.
    """
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for name, factors in artifact_modules.items():
        whole = LoraFactors(factors.a.double(), factors.b.double(), factors.scale).delta()
        if norm == "weight":
            if weights is None or name not in weights:
                raise MethodError(
                    f"rows can't be scaled to those of {name}, whose weight isn't given; of a quantised base "
                    "use norm='update'"
                )
            whole = whole + weights[name].to(whole)
        length = whole.norm(dim=1, keepdim=True)
        for number, direction in enumerate(found):
            drawn = torch.randn(whole.shape, generator=generator(seed, name, number), dtype=torch.float32)
            drawn = drawn.to(whole)
            direction[name] = (drawn * (length / drawn.norm(dim=1, keepdim=True))).to(factors.a.dtype)
    return found


def trajectory_directions(path: Sequence[Mapping[str, LoraFactors]]) -> Trajectory:
    """Find the two leading principal directions of a path of adapters about its end.

    Deviations are from the end and not from the mean, so that the plane passes through the reported adapter.
    Eigenvectors of the T × T Gram matrix give the directions as combinations of the ΔW_t, whose stacked
    factors are brought to their own rank by an SVD in float64, where differences of near points cancel
    harmlessly; or multiplied out in float64, where the stack has more numbers than that.

    Args:
        path: adapters of the same modules and on one device, of any ranks and scales, the last one the end.

    Raises:
        DataError: if fewer than three points differ, modules differ, or the path is a straight line.
    """
    if len(path) < 3 or any(set(point) != set(path[-1]) for point in path):
        raise DataError("a trajectory's plane needs at least three adapters, all of the same modules")
    size = len(path)
    stacked = {name: _stacked([point[name] for point in path]) for name in path[-1]}
    gram = sum((_gram(*parts, size) for parts in stacked.values()), torch.zeros(size, size).double())
    centred = torch.eye(size, dtype=torch.float64)
    centred[:, -1] -= 1
    values, vectors = torch.linalg.eigh(centred @ gram @ centred.t())
    values, vectors = values.flip(0)[:2], vectors.flip(1)[:, :2]
    # On a line the second eigenvalue is the rounding error of products as large as the points themselves.
    if not float(values[1]) > tolerance(torch.float64, size) * float(gram.diagonal().max()):
        raise DataError("this trajectory is a straight line or a point: it has no plane; save more points")
    vectors = vectors * torch.where(vectors[0] < 0, -1.0, 1.0)
    # Σ_t v_t (ΔW_t − ΔW_end) / √λ: the end's coefficient makes the sum of all 0.
    combined = centred.t() @ (vectors / values.sqrt())
    total = float((centred @ gram @ centred.t()).diagonal().sum())
    dtype = torch.promote_types(next(iter(path[-1].values())).a.dtype, torch.float32)
    first, second = (_combined(stacked, combined[:, j], dtype) for j in range(2))
    explained = (float(values[0]) / total, float(values[1]) / total)
    return Trajectory((first, second), vectors * values.sqrt(), explained)


def _stacked(many: Sequence[LoraFactors]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stack factors in float64: A (R × I), s·B (O × R), and which point each of the R ranks is of."""
    owner = torch.tensor([number for number, factors in enumerate(many) for _ in range(factors.rank)])
    a = torch.cat([factors.a.double() for factors in many])
    return a, torch.cat([factors.scale * factors.b.double() for factors in many], 1), owner


def _gram(a: torch.Tensor, b: torch.Tensor, owner: torch.Tensor, size: int) -> torch.Tensor:
    """Compute ⟨ΔW_s, ΔW_t⟩ (T × T): (BᵀB) ∘ (AAᵀ), summed over the ranks of each pair of points."""
    member = functional.one_hot(owner, size).double()
    return member.t() @ ((b.t() @ b) * (a @ a.t())).cpu() @ member


def _combined(
    stacked: Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    coefficients: torch.Tensor,
    dtype: torch.dtype,
) -> Direction:
    """Return Σ_t c_t ΔW_t, dense or in balanced factors of its own rank (at least 1)."""
    found: dict[str, torch.Tensor | LoraFactors] = {}
    factored = {}
    for name, (a, b, owner) in stacked.items():
        weighted = LoraFactors(a, b * coefficients[owner].to(b), 1.0)
        if weighted.compact:
            factored[name] = weighted
        else:
            found[name] = weighted.delta().to(dtype)
    for name, svd in decomposed(factored).items():
        one = factored[name]
        # Rounding adds singular values of the size of the largest term's rounding error.
        terms = float((one.b.norm(dim=0) * one.a.norm(dim=1)).max())
        rank = max(1, int((svd.s > tolerance(torch.float64, one.rank) * terms).sum()))
        whole = sorted_factors(svd, 1.0, dtype)
        found[name] = replace(whole, a=whole.a[:rank], b=whole.b[:, :rank])
    return {name: found[name] for name in stacked}

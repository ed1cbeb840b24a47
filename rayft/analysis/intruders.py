"""Intruder dimensions: singular vectors of the tuned weights W0 + ΔW that are like none of W0's.

A left singular vector is an intruder at ε if its largest |cos| to one of W0's left singular vectors is below
ε. Shuttleworth et al. 2024, arXiv:2410.21228, count among the ten leading vectors of W0 + ΔW; Cadenhead et
al. 2026, arXiv:2606.13767, count among all, over a sweep of ε. The two counts answer different questions,
since the vectors of small singular values turn first.

Shapes: I inputs, O outputs, K singular vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from rayft.analysis.record import Intruders
from rayft.analysis.spectral import check_finite, numerical_rank
from rayft.errors import BaseMismatchError, ReportError
from rayft.methods.base import LoraFactors
from rayft.numerics import generator, tolerance

__all__ = [
    "AT",
    "EVERY_AT",
    "RandomBaseline",
    "count_below",
    "count_intruders",
    "max_cosines",
    "random_baseline",
]

EPSILONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
AT, EVERY_AT = 0.5, 0.9
"""The ε at which one number is reported: of the leading vectors, and of all."""
TOP = 10

DRAWS_AT_ONCE = 2**24
"""Numbers of random vectors that are held at once (128 MiB in float64)."""


@dataclass(frozen=True)
class RandomBaseline:
    """The same count for random directions in place of singular vectors."""

    shares: Mapping[float, float]
    """ε → share of random unit vectors whose largest |cos| to a basis is below ε."""
    typical: float
    """Rule of thumb for that largest |cos|, √(2 ln M / O) for M basis vectors; too large if O is small."""


def count_intruders(
    weights: Mapping[str, torch.Tensor], modules: Mapping[str, torch.Tensor | LoraFactors], most: int
) -> Intruders:
    """Count intruder dimensions over a sweep of ε, mean over some modules.

    Args:
        weights: W0 (O × I) of each module.
        modules: module path → ΔW, dense (O × I) or in factors.
        most: how many modules are decomposed, evenly over the model.

    Raises:
        ArtifactError: if a weight or an update holds NaN or Inf.
    """
    # Sorted, as in an adapter's file: in a whole model's order other modules would be chosen.
    chosen = sorted(modules)[:: max(1, len(modules) // most)][:most]
    counts, shares, baseline = [], [], []
    for path in chosen:
        weight = weights[path]
        cosines = max_cosines(weight, modules[path], None)
        every = count_below(cosines, EPSILONS, len(weight))
        counts.append([*count_below(cosines[:TOP], EPSILONS, len(weight)).values()])
        shares.append([count / max(1, len(cosines)) for count in every.values()])
        baseline.append([TOP * share for share in _random(len(weight), min(weight.shape))])
    mean = [tuple(map(float, np.mean(many, axis=0))) for many in (counts, baseline, shares)]
    return Intruders(
        epsilons=EPSILONS, counts=mean[0], baseline=mean[1], shares=mean[2], top=TOP, modules=tuple(chosen)
    )


@lru_cache
def _random(size: int, basis: int) -> tuple[float, ...]:
    """Return the shares of random vectors below each ε; cached, since a model has few shapes."""
    return tuple(random_baseline(size, EPSILONS, basis=basis).shares.values())


def max_cosines(
    weight0: torch.Tensor, update: torch.Tensor | LoraFactors, top: int | None = 10
) -> torch.Tensor:
    """Return, for each left singular vector of W0 + ΔW, its largest |cos| to one of W0's.

    Vectors whose singular value is no larger than rounding are left out of both matrices. So if O > I, W0 has
    at most I directions in the O-dimensional space, and what ΔW writes outside of them is close to none of
    them. Where singular values coincide, their vectors are not determined, and neither are these cosines.

    Args:
        weight0: O × I; computed on its device, in float64 if it is that and in float32 otherwise.
        update: ΔW, O × I, or its factors.
        top: how many of the vectors of W0 + ΔW, by singular value; all where not given.

    Returns:
        At most `top` and at most min(O, I) cosines, in the order of the singular values of W0 + ΔW.

    Raises:
        BaseMismatchError: if ΔW is of another size.
        ArtifactError: if the weight or the update holds NaN or Inf.
        ReportError: if top is below 1.
    """
    if top is not None and top < 1:
        raise ReportError(f"top is {top}; look at 1 direction at least")
    dtype = torch.promote_types(weight0.dtype, torch.float32)
    weight0 = weight0.detach().to(dtype)
    delta = _dense(update, weight0)
    if delta.shape != weight0.shape:
        raise BaseMismatchError(
            f"the weight is {tuple(weight0.shape)} and the update {tuple(delta.shape)}: use the base that "
            "the adapter was made for"
        )
    before, after = _left_vectors(weight0), _left_vectors(weight0 + delta)[:, :top]
    if not before.numel():
        return torch.zeros(after.shape[1], dtype=dtype, device=weight0.device)
    return (after.t() @ before).abs().amax(1)


def count_below(cosines: torch.Tensor, epsilons: Sequence[float], outputs: int) -> dict[float, int]:
    """Count the cosines (K) that are below each ε by more than rounding over vectors of `outputs` numbers.

    For the cosines of `max_cosines` these are the numbers of intruder dimensions. Compare them with
    `random_baseline`: above some ε nearly every direction other than W0's own is an intruder.

    Raises:
        ReportError: if an ε is not in (0, 1].
    """
    _check_epsilons(epsilons)
    slack = tolerance(cosines.dtype, outputs)
    return {epsilon: int((cosines < epsilon - slack).sum()) for epsilon in epsilons}


def random_baseline(
    size: int, epsilons: Sequence[float], draws: int = 1000, seed: int = 0, *, basis: int | None = None
) -> RandomBaseline:
    """Draw random unit vectors, and return the share whose largest |cos| to a basis is below each ε.

    Args:
        size: O, numbers of a vector.
        epsilons: in (0, 1].
        draws: vectors; the shares have a standard error of at most 1/(2√draws).
        seed: of the draws.
        basis: M, orthonormal vectors that are compared with: min(O, I) of a weight; O where not given.

    Raises:
        ReportError: if an ε is not in (0, 1], or a count is below 1 or above O.
    """
    _check_epsilons(epsilons)
    basis = size if basis is None else basis
    if not 1 <= basis <= size or draws < 1:
        raise ReportError(f"{draws} draws and {basis} basis vectors of {size} numbers: use 1 or more of each")
    draw = generator("intruder baseline", seed)
    found = []
    # A random direction has no preference, so the basis may be the coordinate axes.
    for rows in _portions(draws, max(1, DRAWS_AT_ONCE // size)):
        x = torch.randn(rows, size, generator=draw, dtype=torch.float64)
        found.append(x[:, :basis].abs().amax(1) / x.norm(dim=1))
    cosines = torch.cat(found)
    shares = {epsilon: float((cosines < epsilon).double().mean()) for epsilon in epsilons}
    return RandomBaseline(shares, math.sqrt(2 * math.log(basis) / size))


def _dense(update: torch.Tensor | LoraFactors, like: torch.Tensor) -> torch.Tensor:
    if isinstance(update, torch.Tensor):
        return update.detach().to(like)
    return LoraFactors(update.a.detach().to(like), update.b.detach().to(like), update.scale).delta()


def _left_vectors(weight: torch.Tensor) -> torch.Tensor:
    """Return the left singular vectors (O × K) whose singular value is larger than rounding."""
    check_finite(weight)
    found = torch.linalg.svd(weight, full_matrices=False)
    u: torch.Tensor = found.U
    return u[:, : numerical_rank(found.S, max(weight.shape))]


def _portions(total: int, most: int) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]


def _check_epsilons(epsilons: Sequence[float]) -> None:
    wrong = [epsilon for epsilon in epsilons if not 0 < epsilon <= 1]
    if wrong:
        raise ReportError(f"epsilon {wrong[0]} is not in (0, 1], where cosines are; 0.5 is usual")

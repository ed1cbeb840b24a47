"""Spectra of updates, angles between them, and intruder dimensions.

From the singular values S of ΔW = s·B·A, exact and without forming ΔW (`squeeze.factored_svd`):

    effective rank   exp(−Σ p ln p), p = S/ΣS         Roy & Vetterli 2007, "The effective rank"
    stable rank      ‖ΔW‖_F² / ‖ΔW‖₂²
    energy rank      the smallest k with Σ_{i≤k} S² ≥ share·ΣS²

They depend on ΔW alone: B → cB, A → A/c changes nothing. Principal angles are those of Björck & Golub
1973, "Numerical methods for computing angles between linear subspaces"; intruder dimensions those of
Shuttleworth et al. 2024, arXiv:2410.21228, with ε swept as in Cadenhead et al. 2026, arXiv:2606.13767.

Shapes: I inputs, O outputs, R rank, K singular vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, BaseMismatchError, ReportError
from rayft.methods.base import LoraFactors
from rayft.numerics import generator, tolerance
from rayft.squeeze.factored_svd import FactoredSVD, factored_svd
from rayft.squeeze.rank import rank_for_energy

__all__ = [
    "RandomBaseline",
    "SpectralSummary",
    "count_below",
    "effective_rank",
    "energy_rank",
    "max_cosines",
    "principal_angles",
    "random_baseline",
    "spectral_summary",
    "stable_rank",
    "summaries",
    "summary",
]

SHARES = (0.9, 0.95, 0.99)
"""Shares of the energy whose ranks a summary gives."""

DRAWS_AT_ONCE = 2**24
"""Numbers of random vectors that are held at once (128 MiB in float64)."""


@dataclass(frozen=True)
class SpectralSummary:
    """What the singular values of one ΔW say; all 0 where ΔW is 0."""

    rank: int
    """How many singular values are more than rounding in float64."""
    effective_rank: float
    stable_rank: float
    energy_ranks: Mapping[float, int]
    """Share of the energy → smallest rank that retains it."""
    spectral: float
    """‖ΔW‖₂, the largest singular value."""
    frobenius: float
    """‖ΔW‖_F."""
    nuclear: float
    """Sum of the singular values."""


@dataclass(frozen=True)
class RandomBaseline:
    """What random directions give where singular vectors were counted."""

    shares: Mapping[float, float]
    """ε → share of random unit vectors whose largest |cos| to a basis is below ε."""
    typical: float
    """Rule of thumb for that largest |cos|, √(2 ln M / O) for M basis vectors: too large for few outputs."""


def effective_rank(singular_values: torch.Tensor) -> float:
    """Give exp of the entropy of S/ΣS (K values): between 1 and K; 0 where all are 0."""
    total = singular_values.double().sum()
    return float(torch.special.entr(singular_values.double() / total).sum().exp()) if total else 0.0


def stable_rank(singular_values: torch.Tensor) -> float:
    """Give ΣS²/max S² (K values): between 1 and the rank; 0 where all are 0."""
    s = singular_values.double()
    return float((s / s.max()).square().sum()) if s.any() else 0.0


def energy_rank(singular_values: torch.Tensor, share: float) -> int:
    """Give the smallest rank that retains a share (0 < share ≤ 1) of ΣS²; 0 where all are 0.

    Raises:
        ReportError: if the share is out of its range.
    """
    if not 0 < share <= 1:
        raise ReportError(f"share {share} is not in (0, 1]; 0.95 asks for 95% of the energy")
    s = singular_values.double().sort(descending=True).values
    # Divided by the largest: squares of an update of 1e-200 would be 0.
    return rank_for_energy((s / s[0]).tolist(), share) if s.any() else 0


def spectral_summary(
    singular_values: torch.Tensor, length: int, shares: Sequence[float] = SHARES
) -> SpectralSummary:
    """Sum up a spectrum.

    Args:
        singular_values: K, largest first.
        length: the larger side of ΔW, which decides what is rounding.
        shares: of the energy, whose ranks are wanted.

    Raises:
        ReportError: if a share is not in (0, 1].
    """
    s = singular_values.double()
    return SpectralSummary(
        rank=_rank(s, length),
        effective_rank=effective_rank(s),
        stable_rank=stable_rank(s),
        energy_ranks={share: energy_rank(s, share) for share in shares},
        spectral=float(s.max()),
        frobenius=float(s.norm()),
        nuclear=float(s.sum()),
    )


def summary(factors: LoraFactors, shares: Sequence[float] = SHARES) -> SpectralSummary:
    """Sum up the spectrum of s·B·A.

    Raises:
        ArtifactError: if a factor holds NaN or Inf.
        ReportError: if a share is not in (0, 1].
    """
    return spectral_summary(_svd(factors).s, max(factors.b.shape[0], factors.a.shape[1]), shares)


def summaries(artifact: AdapterArtifact, shares: Sequence[float] = SHARES) -> dict[str, SpectralSummary]:
    """Sum up every module of an adapter, at the rank that it has: module path → summary.

    Raises:
        ArtifactError: naming the module, if a factor holds NaN or Inf.
        ReportError: if a share is not in (0, 1].
    """
    found = {}
    for name, factors in artifact.modules.items():
        try:
            found[name] = summary(factors, shares)
        except ArtifactError as error:
            raise ArtifactError(f"{name}: {error}") from error
    return found


def principal_angles(
    first: LoraFactors, second: LoraFactors, side: Literal["output", "input"], top: int | None = None
) -> torch.Tensor:
    """Give the angles between what two updates write to (output) or read from (input).

    The subspaces are spanned by at most `top` singular directions, without those whose singular value
    is rounding. Sines and cosines are both computed (section 3 of Björck & Golub), so that small and large
    angles are accurate: arccos alone errs by 2e-8 near 0.

    Args:
        first: factors of one update.
        second: of another update of the same layer; the ranks may differ.
        side: "output" for left singular vectors (of O numbers), "input" for right ones (of I).
        top: how many directions, by singular value; all where not given.

    Returns:
        Radians in [0, π/2], smallest first, as many as the smaller subspace has directions (none where
        an update is 0); float64, on the CPU.

    Raises:
        BaseMismatchError: if the updates differ in size on that side.
        ArtifactError: if a factor holds NaN or Inf.
        ReportError: if top is below 1.
    """
    if top is not None and top < 1:
        raise ReportError(f"top is {top}; compare at least 1 direction")
    spans = [_directions(factors, side, top) for factors in (first, second)]
    sizes = [span.shape[0] for span in spans]
    if sizes[0] != sizes[1]:
        raise BaseMismatchError(
            f"the updates have {sizes[0]} and {sizes[1]} {side}s: compare adapters of one layer of one base"
        )
    return _angles(*spans)


def _angles(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Give the principal angles of two orthonormal bases, smallest first.

    SciPy 1.17's `subspace_angles` chooses between sine and cosine in the reverse order where some angles
    are above π/4 and some below, and then finds 2e-8 for an angle of 1e-9.
    """
    large, small = sorted((first, second), key=lambda span: span.shape[1], reverse=True)
    inner = large.t() @ small
    if not inner.numel():
        return inner.new_zeros(0)
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(small - large @ inner).flip(0)
    return torch.atan2(sines, cosines)


def max_cosines(
    weight0: torch.Tensor, update: torch.Tensor | LoraFactors, top: int | None = 10
) -> torch.Tensor:
    """Give, for each left singular vector of W0 + ΔW, its largest |cos| to one of W0's.

    Vectors whose singular value is rounding are no directions of either matrix and are left out. So with
    O > I, W0 has at most I directions of the O, and what ΔW writes outside of them is near to none.
    Where singular values coincide, their vectors are not determined, nor are these cosines.

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
    """Count the cosines (K) below each ε by more than rounding over vectors of `outputs` numbers.

    Of `max_cosines`, that is the intruder dimensions. Compare with `random_baseline`: from some ε on, nearly
    every direction that is not W0's own is one.

    Raises:
        ReportError: if an ε is not in (0, 1].
    """
    _check_epsilons(epsilons)
    slack = tolerance(cosines.dtype, outputs)
    return {epsilon: int((cosines < epsilon - slack).sum()) for epsilon in epsilons}


def random_baseline(
    size: int, epsilons: Sequence[float], draws: int = 1000, seed: int = 0, *, basis: int | None = None
) -> RandomBaseline:
    """Draw random unit vectors and give the share whose largest |cos| to a basis is below each ε.

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


def _svd(factors: LoraFactors) -> FactoredSVD:
    _check_finite(factors.a, factors.b)
    return factored_svd(factors)


def _directions(factors: LoraFactors, side: Literal["output", "input"], top: int | None) -> torch.Tensor:
    """Give a basis of an update's span on one side, on the CPU."""
    svd = _svd(factors)
    vectors = svd.u if side == "output" else svd.v
    rank = _rank(svd.s, max(len(svd.u), len(svd.v)))
    return vectors[:, : rank if top is None else min(top, rank)].cpu()


def _dense(update: torch.Tensor | LoraFactors, like: torch.Tensor) -> torch.Tensor:
    if isinstance(update, torch.Tensor):
        return update.detach().to(like)
    return LoraFactors(update.a.detach().to(like), update.b.detach().to(like), update.scale).delta()


def _left_vectors(weight: torch.Tensor) -> torch.Tensor:
    """Give the left singular vectors (O × K) whose singular value is more than rounding."""
    _check_finite(weight)
    found = torch.linalg.svd(weight, full_matrices=False)
    u: torch.Tensor = found.U
    return u[:, : _rank(found.S, max(weight.shape))]


def _rank(s: torch.Tensor, length: int) -> int:
    """Count the singular values that rounding over `length` terms does not explain."""
    return int((s > tolerance(s.dtype, length) * s.max()).sum())


def _portions(total: int, most: int) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]


def _check_finite(*tensors: torch.Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ArtifactError(
            "it holds NaN or Inf, which has no spectrum; train it again or use another step's"
        )


def _check_epsilons(epsilons: Sequence[float]) -> None:
    wrong = [epsilon for epsilon in epsilons if not 0 < epsilon <= 1]
    if wrong:
        raise ReportError(f"epsilon {wrong[0]} is not in (0, 1], where cosines are; 0.5 is usual")

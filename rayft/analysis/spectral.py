"""Spectra of updates, and the angles between them.

From the singular values S of ΔW = s·B·A, exact and without forming ΔW (`squeeze.factored_svd`):

    effective rank   exp(−Σ p ln p), p = S/ΣS         Roy & Vetterli 2007, "The effective rank"
    stable rank      ‖ΔW‖_F² / ‖ΔW‖₂²
    energy rank      the smallest k with Σ_{i≤k} S² ≥ share·ΣS²

They depend on ΔW alone: B → cB, A → A/c changes nothing. Principal angles are those of Björck & Golub
1973, "Numerical methods for computing angles between linear subspaces".

Shapes: I inputs, O outputs, R rank, K singular vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, BaseMismatchError, ReportError
from rayft.methods.base import LoraFactors
from rayft.numerics import tolerance
from rayft.squeeze.factored_svd import FactoredSVD, factored_svd
from rayft.squeeze.rank import rank_for_energy

__all__ = [
    "SpectralSummary",
    "check_finite",
    "effective_rank",
    "energy_rank",
    "numerical_rank",
    "principal_angles",
    "spectral_summary",
    "stable_rank",
    "summaries",
    "summary",
]

SHARES = (0.9, 0.95, 0.99)
"""Shares of the energy whose ranks a summary gives."""


@dataclass(frozen=True)
class SpectralSummary:
    """Summary of the singular values of one ΔW; every number is 0 if ΔW is 0."""

    rank: int
    """How many singular values are larger than rounding in float64."""
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


def effective_rank(singular_values: torch.Tensor) -> float:
    """Return exp of the entropy of S/ΣS (K values): between 1 and K; 0 if all are 0."""
    total = singular_values.double().sum()
    return float(torch.special.entr(singular_values.double() / total).sum().exp()) if total else 0.0


def stable_rank(singular_values: torch.Tensor) -> float:
    """Return ΣS²/max S² (K values): between 1 and the rank; 0 if all are 0."""
    s = singular_values.double()
    return float((s / s.max()).square().sum()) if s.any() else 0.0


def energy_rank(singular_values: torch.Tensor, share: float) -> int:
    """Return the smallest rank that retains a share (0 < share ≤ 1) of ΣS²; 0 if all are 0.

    Raises:
        ArtifactError: if a value is NaN or Inf.
        ReportError: if the share is out of its range.
    """
    if not 0 < share <= 1:
        raise ReportError(f"share {share} is not in (0, 1]; 0.95 asks for 95% of the energy")
    check_finite(singular_values)
    s = singular_values.double().sort(descending=True).values
    # Divided by the largest value first, since the squares of an update of 1e-200 would be 0.
    return rank_for_energy((s / s[0]).tolist(), share) if s.any() else 0


def spectral_summary(
    singular_values: torch.Tensor, length: int, shares: Sequence[float] = SHARES
) -> SpectralSummary:
    """Summarise a spectrum.

    Args:
        singular_values: K, largest first.
        length: the larger side of ΔW, which determines the rounding error.
        shares: of the energy, whose ranks are wanted.

    Raises:
        ArtifactError: if a value is NaN or Inf.
        ReportError: if a share is not in (0, 1].
    """
    s = singular_values.double()
    return SpectralSummary(
        rank=numerical_rank(s, length),
        effective_rank=effective_rank(s),
        stable_rank=stable_rank(s),
        energy_ranks={share: energy_rank(s, share) for share in shares},
        spectral=float(s.max()) if len(s) else 0.0,
        frobenius=float(s.norm()),
        nuclear=float(s.sum()),
    )


def summary(factors: LoraFactors, shares: Sequence[float] = SHARES) -> SpectralSummary:
    """Summarise the spectrum of s·B·A.

    Raises:
        ArtifactError: if a factor holds NaN or Inf.
        ReportError: if a share is not in (0, 1].
    """
    return spectral_summary(_svd(factors).s, max(factors.b.shape[0], factors.a.shape[1]), shares)


def summaries(artifact: AdapterArtifact, shares: Sequence[float] = SHARES) -> dict[str, SpectralSummary]:
    """Summarise the spectrum of every module of an adapter at its present rank: module path → summary.

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
    """Return the principal angles between the output (or input) subspaces of two updates.

    The output subspace is the one that an update writes to, the input subspace the one that it reads from.
    Each is spanned by at most `top` singular directions, without those whose singular value is rounding. Both
    sines and cosines are computed (section 3 of Björck & Golub), so that small and large angles are accurate:
    arccos alone has an error of 2e-8 near 0.

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
        ReportError: if top is below 1, or there is no such side.
    """
    if side not in ("output", "input"):
        raise ReportError(f"side is {side!r}; write 'output' or 'input'")
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
    """Return the principal angles of two orthonormal bases, smallest first.

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


def _svd(factors: LoraFactors) -> FactoredSVD:
    check_finite(factors.a, factors.b)
    return factored_svd(factors)


def _directions(factors: LoraFactors, side: Literal["output", "input"], top: int | None) -> torch.Tensor:
    """Return a basis of an update's span on one side, on the CPU."""
    svd = _svd(factors)
    vectors = svd.u if side == "output" else svd.v
    rank = numerical_rank(svd.s, max(len(svd.u), len(svd.v)))
    return vectors[:, : rank if top is None else min(top, rank)].cpu()


def numerical_rank(s: torch.Tensor, length: int) -> int:
    """Count the singular values (K) that are larger than the rounding error of sums over `length` terms."""
    return int((s > tolerance(s.dtype, length) * s.max()).sum()) if len(s) else 0


def check_finite(*tensors: torch.Tensor) -> None:
    """Raise an ArtifactError if any tensor holds NaN or Inf."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ArtifactError(
            "it holds NaN or Inf, which has no spectrum; train it again or use another step's"
        )

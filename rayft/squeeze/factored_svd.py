"""Exact SVD of ΔW = s·B·A from its factors. LoRA-Squeeze, Vulić et al. 2026, arXiv:2602.10993, Alg. 2.

    Q_B R_B = qr(B)  (O × R)        Q_A R_A = qr(Aᵀ)  (I × R)        C = s·R_B R_Aᵀ  (R × R)
    U S Vᵀ = svd(C)    ⇒    ΔW = (Q_B U) S (Q_A V)ᵀ

The R × R core carries the whole spectrum: nothing of size O × I is formed. Cost O((O + I)R² + R³).
All in float64: in float32 the singular values have an error of 1e-6, and of 2.5e-4 at condition 1e6.

On a GPU, factors of one shape are decomposed as one stack, by CholeskyQR2 (Yamamoto et al. 2015, "Roundoff
error analysis of the CholeskyQR2 algorithm"): it consists of products of matrices, while Householder's QR is
many small launches. Householder's QR is used where CholeskyQR2 is not accurate (dependent columns, condition
above about 1e7). The cores are decomposed on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rayft.methods.base import LoraFactors

__all__ = [
    "FactoredSVD",
    "decomposed",
    "factored_svd",
    "factored_svds",
    "sorted_factors",
    "stacks",
    "thin_qr",
]

ORTHOGONAL = 0.1
"""Most that QᵀQ of the first Cholesky QR may differ from I; the second then corrects Q to rounding."""

STACK_BYTES = 2**28
"""Bytes of factors in float64 that are decomposed on a GPU at once."""


@dataclass(frozen=True, eq=False)
class FactoredSVD:
    """ΔW = u·diag(s)·vᵀ: u (O × K), s (K) falling, v (I × K), K = min(R, O, I); float64."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor


def factored_svd(factors: LoraFactors) -> FactoredSVD:
    """Decompose s·B·A exactly, on the factors' device."""
    return factored_svds([factors])[0]


def factored_svds(many: Sequence[LoraFactors]) -> list[FactoredSVD]:
    """Decompose factors of one shape and on one device as a stack (M × O × R and M × R × I)."""
    scales = torch.tensor([factors.scale for factors in many], dtype=torch.float64, device=many[0].b.device)
    q_b, r_b = thin_qr(torch.stack([factors.b.detach() for factors in many]).double())
    q_a, r_a = thin_qr(torch.stack([factors.a.detach() for factors in many]).double().mT)
    core = scales[:, None, None] * (r_b @ r_a.mT)
    u, s, vt = (part.to(q_b.device) for part in torch.linalg.svd(core.cpu(), full_matrices=False))
    return [FactoredSVD(*parts) for parts in zip(q_b @ u, s, q_a @ vt.mT, strict=True)]


def decomposed(modules: Mapping[str, LoraFactors]) -> dict[str, FactoredSVD]:
    """Decompose an adapter's modules on their device, as stacks if it is a GPU; the order is kept."""
    found: dict[str, FactoredSVD] = {}
    for names in stacks(modules):
        found |= zip(names, factored_svds([modules[name] for name in names]), strict=True)
    return {name: found[name] for name in modules}


def stacks(
    modules: Mapping[str, LoraFactors], device: str | torch.device | None = None
) -> Iterator[list[str]]:
    """Group modules of one shape for a GPU; on a CPU each is alone, since LAPACK takes one at a time.

    Args:
        modules: module path → factors.
        device: where they will be decomposed; the factors' own device if not given.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, factors in modules.items():
        place = torch.device(device or factors.a.device)
        alone = name if place.type == "cpu" else ""
        groups.setdefault((alone, place, factors.a.shape, factors.b.shape), []).append(name)
    for names in groups.values():
        one = modules[names[0]]
        at_once = max(1, STACK_BYTES // (8 * (one.a.numel() + one.b.numel())))
        for start in range(0, len(names), at_once):
            yield names[start : start + at_once]


def thin_qr(x: torch.Tensor, *, by_cholesky: bool | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorise a stack: Q (M × N × K) of orthonormal columns, R (M × K × R), K = min(N, R).

    Args:
        x: M × N × R, float64.
        by_cholesky: whether to use two Cholesky factorisations where these are accurate; if not given, on
            GPUs alone. R is upper triangular, and with Cholesky its diagonal is positive.
    """
    if x.is_cuda if by_cholesky is None else by_cholesky:
        found = _cholesky_twice(x)
        if found is not None:
            return found
    q, r = torch.linalg.qr(x)
    return q, r


def _cholesky_twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return Q and R, or None if a matrix of the stack is too badly conditioned."""
    if x.shape[-2] < x.shape[-1]:
        return None
    first, failed = torch.linalg.cholesky_ex(x.mT @ x)
    q = torch.linalg.solve_triangular(first, x.mT, upper=False).mT
    gram = q.mT @ q
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    second, failed_too = torch.linalg.cholesky_ex(gram)
    # One test for the whole stack, so that the host waits for the device once. It fails for NaN too.
    good = ((gram - eye).abs().amax() <= ORTHOGONAL) & ~(failed.any() | failed_too.any())
    if not bool(good):
        return None
    return torch.linalg.solve_triangular(second, q.mT, upper=False).mT, (first @ second).mT


def sorted_factors(svd: FactoredSVD, scale: float, dtype: torch.dtype) -> LoraFactors:
    """Return a decomposition as balanced factors with the scale kept, columns sorted by singular value.

    B' = U √(S/s), A' = √(S/s) Vᵀ, so that ‖B'‖ = ‖A'‖ and s·B'[:, :k]·A'[:k] is the best rank-k
    approximation of ΔW (Eckart–Young) for every k: a prefix needs no rescaling. If the scale is below 0
    (it can't be 0), B' takes the sign.
    """
    root = (svd.s / abs(scale)).sqrt()
    b = svd.u * (root if scale > 0 else -root)
    return LoraFactors(a=(root[:, None] * svd.v.t()).to(dtype), b=b.to(dtype), scale=scale)

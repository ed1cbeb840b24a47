"""Squeeze dense updates, one module at a time, into an adapter.

    ΔW (O × I)  →  U_k S_k V_kᵀ  →  B = U_k √S_k,  A = √S_k V_kᵀ,  s = 1 (α = rank)

Columns are sorted by singular value, so every prefix is the best approximation of its rank that was found.
The k singular values and Σσ² of the others are kept too; the retained energy follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta, ModuleShapes
from rayft.errors import SqueezeError
from rayft.methods.base import LoraFactors
from rayft.numerics import generator
from rayft.squeeze.factored_svd import sorted_factors
from rayft.squeeze.randomised_svd import randomised_svd, svd_for_energy, total_energy

__all__ = ["DenseSqueeze"]


class DenseSqueeze:
    """Collects the squeezed ΔW of each module, and builds an adapter from them.

    A module whose ΔW is 0 gets no factors, since it equals the base; `unchanged` lists these modules.

    Args:
        shapes: module path → (O, I), of all modules that will be added.
        rank: of each module; a module with a smaller min(O, I) gets that rank.
        energy: instead of a rank, the share of each module's ‖ΔW‖² to retain, at a rank of its own.
        seed: of the random numbers, which depend on the module's path and not on the other modules.
        device: where to compute.
        dtype: of the factors.

    Raises:
        SqueezeError: if not exactly one of rank and energy is given, or it is out of its range.
    """

    def __init__(
        self,
        shapes: ModuleShapes,
        *,
        rank: int | None = None,
        energy: float | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_request(shapes, rank, energy)
        self.unchanged: list[str] = []
        self._rank, self._energy, self._seed = rank, energy, seed
        self._device, self._dtype = device, dtype
        self._shapes = shapes
        self._modules: dict[str, LoraFactors] = {}
        self._spectra: dict[str, tuple[float, ...]] = {}
        self._tails: dict[str, float] = {}

    def add(self, module: str, delta: torch.Tensor) -> None:
        """Squeeze one module's ΔW (O × I) and keep its factors, nothing of the size of ΔW.

        Raises:
            SqueezeError: if it holds NaN or Inf, naming the module.
        """
        shape = self._shapes[module]
        assert tuple(delta.shape) == tuple(shape), f"{module}: {tuple(delta.shape)} is not {shape}"
        delta = delta.to(self._device)
        draw = generator(self._seed, module, "randomised svd")
        try:
            total = total_energy(delta)
            if not total:
                self.unchanged.append(module)
                return
            if self._energy is not None:
                svd = svd_for_energy(delta, self._energy, generator=draw)
            else:
                assert self._rank is not None
                svd = randomised_svd(delta, self._rank, generator=draw)
        except SqueezeError as error:
            raise SqueezeError(f"{module}: {error}") from error
        factors = sorted_factors(svd, 1.0, self._dtype)
        a, b = (tensor.cpu().contiguous() for tensor in (factors.a, factors.b))
        self._modules[module] = LoraFactors(a, b, 1.0)
        self._spectra[module] = tuple(svd.s.tolist())
        left = total - float(svd.s.square().sum())
        self._tails[module] = 0.0 if len(svd.s) == min(shape) else max(left, 0.0)

    def artifact(self, meta: ArtifactMeta, heads: Mapping[str, torch.Tensor]) -> AdapterArtifact:
        """Return the adapter of all modules that changed, with the spectrum in `meta`.

        Raises:
            SqueezeError: if no module changed.
        """
        if not self._modules:
            raise SqueezeError(
                f"none of {len(self.unchanged)} linear layers differs from the base, so there is no "
                "update to extract; was the right checkpoint given, and do targets name what was trained?"
            )
        spectrum = {"singular_values": self._spectra, "tail_energy": self._tails}
        return AdapterArtifact(self._modules, heads, meta.model_copy(update=spectrum))


def _check_request(shapes: ModuleShapes, rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise SqueezeError("give a rank or an energy, one of them: a dense update has no rank of its own")
    if energy is not None and not 0 < energy <= 1:
        raise SqueezeError(f"energy {energy} is not in (0, 1]; 0.95 keeps 95% of the update's energy")
    most = max(min(shape) for shape in shapes.values())
    if rank is not None and not 1 <= rank <= most:
        raise SqueezeError(f"rank {rank} is not between 1 and {most}, the most that a module can have")

"""The update of each layer, given as an adapter's factors or as a whole tuned model.

For a whole model ΔW = W_tuned − W0 is read from the files of both, one layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from rayft.analysis.intruders import AT, EVERY_AT, count_intruders
from rayft.analysis.norms import matrix, singular_values
from rayft.analysis.record import ModuleSpectrum
from rayft.analysis.spectral import spectral_summary
from rayft.methods.base import LoraFactors
from rayft.models.difference import Pair
from rayft.squeeze.factored_svd import decomposed

__all__ = ["Update", "spectra"]


class Update:
    """A base's weights and their updates.

    Args:
        weights: path of each changed layer → W0 (O × I).
        changes: path → ΔW, dense (O × I) or in factors.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], changes: Mapping[str, torch.Tensor | LoraFactors]
    ) -> None:
        self.weights, self.changes = weights, changes

    @classmethod
    def of_adapter(cls, model: nn.Module, modules: Mapping[str, LoraFactors]) -> Update:
        """Return the update of an adapter: its factors, with the weights of the wrapped base they are for."""
        return cls(_Read(modules, lambda path: matrix(model, path)), modules)

    @classmethod
    def of_pair(cls, pair: Pair, device: torch.device) -> Update:
        """Return the update of a tuned model, whose layers are read when they are needed."""
        return cls(
            _Read(pair.shapes, lambda path: pair.weight(path).to(device)),
            _Read(pair.shapes, lambda path: pair.update(path).to(device)),
        )

    @cached_property
    def singular_values(self) -> Mapping[str, torch.Tensor]:
        """Singular values of each layer's ΔW, largest first, in float64.

        Raises:
            ArtifactError: if a factor holds NaN or Inf.
            ModelError: if a tensor of a whole model does.
        """
        factors, found = {}, {}
        for path, change in self.changes.items():
            if isinstance(change, LoraFactors):
                factors[path] = change
            else:
                found[path] = singular_values(change)
        found |= {path: svd.s for path, svd in decomposed(factors).items()}
        return {path: found[path] for path in self.changes}


class _Read(Mapping[str, Any]):
    """Tensors that are computed at each access and not kept."""

    def __init__(self, paths: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
        self._paths, self._read = dict.fromkeys(paths), read

    def __getitem__(self, path: str) -> torch.Tensor:
        return self._read(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def spectra(update: Update, intruder_modules: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Summarise an update's spectra, and count intruder dimensions in some of its layers.

    Returns:
        The measures, and fields of `AdapterAnalysis`.

    Raises:
        ArtifactError: if a factor holds NaN or Inf.
        ModelError: if a tensor of a whole model does.
    """
    values, found, squares = update.singular_values, {}, 0.0
    for path, weight in update.weights.items():
        found[path] = spectral_summary(values[path], max(weight.shape))
        squares += float(weight.double().square().sum())
    known = {
        path: ModuleSpectrum(
            effective_rank=one.effective_rank, stable_rank=one.stable_rank,
            energy_ranks={f"{share:g}": rank for share, rank in one.energy_ranks.items()},
            spectral_norm=one.spectral, frobenius_norm=one.frobenius, nuclear_norm=one.nuclear,
        )
        for path, one in found.items()
    }  # fmt: skip
    whole = math.sqrt(sum(one.frobenius**2 for one in found.values()))
    intruders = count_intruders(update.weights, update.changes, intruder_modules)
    measures = {
        "update_norm": whole,
        "update_over_base": whole / math.sqrt(squares),
        "update_spectral_max": max(one.spectral for one in found.values()),
        "update_nuclear": sum(one.nuclear for one in found.values()),
        "effective_rank_mean": float(np.mean([one.effective_rank for one in found.values()])),
        "stable_rank_mean": float(np.mean([one.stable_rank for one in found.values()])),
        f"intruders_below_{AT:g}": intruders.counts[intruders.epsilons.index(AT)],
        f"intruder_share_below_{EVERY_AT:g}": intruders.shares[intruders.epsilons.index(EVERY_AT)],
    }
    spectrum = _median_spectrum([*values.values()])
    return measures, {"spectra": known, "intruders": intruders, "median_spectrum": spectrum}


def _median_spectrum(spectra: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Return the median of σᵢ/σ₁ over modules, up to the lowest rank among them."""
    relative = [values / values[0] for values in spectra if values[0] > 0]
    if not relative:
        return ()
    length = min(map(len, relative))
    return tuple(torch.stack([values[:length] for values in relative]).quantile(0.5, 0).tolist())

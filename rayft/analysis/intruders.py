"""Intruder dimensions of an adapter: among the leading singular vectors, and among all of them.

Shuttleworth et al. 2024, arXiv:2410.21228, look at the ten leading vectors of W0 + ΔW; Beyond LoRA counts
all. Vectors of small singular values turn first, so the two say different things.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

from rayft.analysis.record import Intruders
from rayft.analysis.spectral import count_below, max_cosines, random_baseline
from rayft.methods.base import LoraFactors

__all__ = ["AT", "EVERY_AT", "count_intruders"]

EPSILONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
AT, EVERY_AT = 0.5, 0.9
"""The ε that a number for itself is given at, of the leading vectors and of all."""
TOP = 10


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
    # Sorted, as an adapter's file has them: of a model's own order others would be chosen.
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
    """Give the shares of random vectors below each ε: one for each of the few shapes that there are."""
    return tuple(random_baseline(size, EPSILONS, basis=basis).shares.values())

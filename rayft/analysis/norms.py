"""Weights of a base's layers, their singular values and norms, and the norms of the layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rayft.data.pack import AnyBatch
from rayft.evaluate.loss import mean_loss
from rayft.methods.base import AdapterLinear
from rayft.models.targets import linears

__all__ = ["matrix", "singular_values", "spectral_norm", "spectral_norms", "squared_norms"]

_NORMS: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()
"""‖W0‖₂ of a base's layers, computed once for all its adapters."""


def matrix(model: nn.Module, path: str) -> torch.Tensor:
    """Return the weight (O × I) of a wrapped layer."""
    layer = model.get_submodule(path)
    assert isinstance(layer, AdapterLinear)
    return layer.matrix


def spectral_norms(model: nn.Module) -> dict[str, float]:
    """Return ‖W0‖₂ of every linear layer, in the model's order."""
    if model not in _NORMS:
        _NORMS[model] = {path: spectral_norm(matrix(model, path)) for path in linears(model)}
    return _NORMS[model]


def spectral_norm(weight: torch.Tensor) -> float:
    """Return ‖W‖₂ of a matrix."""
    return float(singular_values(weight)[0])


def singular_values(weight: torch.Tensor) -> torch.Tensor:
    """Return the min(O, I) singular values of a matrix in float64, largest first.

    They are the square roots of the eigenvalues of the smaller of W Wᵀ and Wᵀ W, which takes a fraction of
    the time of an SVD and is exact to about 1e-8 of the largest.
    """
    whole = weight.double()
    gram = whole @ whole.t() if len(whole) < whole.shape[1] else whole.t() @ whole
    values: torch.Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_min(0).sqrt().flip(0)


@torch.inference_mode()
def squared_norms(
    model: nn.Module, batches: Sequence[AnyBatch], modules: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Return ‖x‖² of every input token of each adapted layer, in the order in which the layers are called."""
    found: dict[str, list[torch.Tensor]] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().double()
            found.setdefault(path, []).append(x.square().sum(-1).flatten())

        return keep

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in modules]
    try:
        mean_loss(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return {path: torch.cat(parts).cpu() for path, parts in found.items()}

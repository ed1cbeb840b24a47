"""Classification heads: a trial starts from the checkpoint's parameters of them, and draws those it lacks.

`remember` keeps a copy of the heads of a model that was just loaded; heads are small. From that copy
`reset_heads` starts a trial, and `restore` undoes what a trial or an adapter changed in the heads. So each
trial on a base in memory starts as it would in a fresh process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rayft.models.targets import heads
from rayft.numerics import generator

__all__ = ["HeadsAtLoad", "head_parameters", "recall", "remember", "remembered", "reset_heads", "restore"]

AT_LOAD = "_rayft_heads"
"""Attribute of a model for the copy of its heads."""


@dataclass(frozen=True)
class HeadsAtLoad:
    """The heads of a model as it was loaded, on the CPU."""

    values: Mapping[str, torch.Tensor]
    """Parameter path → value; drawn from a fixed seed where the checkpoint has none."""
    held: frozenset[str]
    """Paths of the parameters that the checkpoint has."""


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the classification heads: path in the model → parameter."""
    return {
        f"{path}.{leaf}": parameter
        for path, head in heads(model).items()
        for leaf, parameter in head.named_parameters()
    }


def remember(model: nn.Module, lacking: Iterable[str]) -> None:
    """Keep a copy of a freshly loaded model's heads.

    Args:
        model: the model; for a language model, which has no heads, nothing is kept.
        lacking: parameter paths that the checkpoint lacks, or has in another shape.
    """
    values = {name: value.detach().cpu().clone() for name, value in head_parameters(model).items()}
    if values:
        recall(model, HeadsAtLoad(values, frozenset(values) - frozenset(lacking)))


def remembered(model: nn.Module) -> HeadsAtLoad | None:
    """Return the copy of a model's heads, or None if there is none."""
    return getattr(model, AT_LOAD, None)


def recall(model: nn.Module, at_load: HeadsAtLoad | None) -> None:
    """Set a model's copy of its heads to one that was made elsewhere."""
    setattr(model, AT_LOAD, at_load)


def restore(model: nn.Module) -> None:
    """Set the heads to what was loaded; a model without a copy of its heads is not changed."""
    at_load = remembered(model)
    if at_load is None:
        return
    for name, parameter in head_parameters(model).items():
        _put(parameter, at_load.values[name])


def reset_heads(model: nn.Module, seed: int, given: Mapping[str, torch.Tensor] | None = None) -> None:
    """Set the heads for the start of a trial: from `given`, else from the checkpoint, else from the seed.

    From the seed, weights are drawn with σ = 0.02, norms start at 1 and biases at 0. In a model without a
    copy of its heads all are drawn. `given` maps parameter paths to an adapter's values, whose shapes fit.
    """
    at_load = remembered(model)
    for name, parameter in head_parameters(model).items():
        if given and name in given:
            _put(parameter, given[name])
            continue
        if at_load is not None and name in at_load.held:
            _put(parameter, at_load.values[name])
            continue
        path, _, leaf = name.partition(".")
        fresh = torch.full(parameter.shape, float(name.endswith("weight")))
        if parameter.ndim > 1:
            fresh.normal_(0, 0.02, generator=generator(seed, path, leaf))
        _put(parameter, fresh)


def _put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    # A parameter that ZeRO-3 has partitioned holds no numbers; such a base serves no other trial.
    if parameter.numel():
        parameter.data.copy_(value)

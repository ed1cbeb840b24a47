"""Classification heads: a trial starts from what the checkpoint holds of them, and draws the rest.

`remember` copies the heads of a model that was just loaded, beside the model; they are small. From that
copy `reset_heads` starts a trial and `restore` takes back what a trial or an adapter left in them, so a
base in memory starts each trial as a fresh process does.
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
"""Attribute of a model that remembers its heads."""


@dataclass(frozen=True)
class HeadsAtLoad:
    """The heads of a model as it was loaded, on the CPU."""

    values: Mapping[str, torch.Tensor]
    """Parameter path → value; drawn from a fixed seed where the checkpoint has none."""
    held: frozenset[str]
    """Those that the checkpoint has."""


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters of the classification heads: path in the model → parameter."""
    return {
        f"{path}.{leaf}": parameter
        for path, head in heads(model).items()
        for leaf, parameter in head.named_parameters()
    }


def remember(model: nn.Module, lacking: Iterable[str]) -> None:
    """Keep a copy of a freshly loaded model's heads.

    Args:
        model: it; a language model has no heads, and nothing is kept.
        lacking: parameter paths that the checkpoint lacks, or has in another shape.
    """
    values = {name: value.detach().cpu().clone() for name, value in head_parameters(model).items()}
    if values:
        recall(model, HeadsAtLoad(values, frozenset(values) - frozenset(lacking)))


def remembered(model: nn.Module) -> HeadsAtLoad | None:
    """Return the heads that a model remembers, if it does."""
    return getattr(model, AT_LOAD, None)


def recall(model: nn.Module, at_load: HeadsAtLoad | None) -> None:
    """Have a model remember heads that were loaded elsewhere."""
    setattr(model, AT_LOAD, at_load)


def restore(model: nn.Module) -> None:
    """Put the heads back as they were loaded; nothing happens to a model that remembers none."""
    at_load = remembered(model)
    if at_load is None:
        return
    for name, parameter in head_parameters(model).items():
        _put(parameter, at_load.values[name])


def reset_heads(model: nn.Module, seed: int, given: Mapping[str, torch.Tensor] | None = None) -> None:
    """Start the heads of a trial: what is given or the checkpoint holds as it is, the rest from the seed.

    Drawn are weights with σ = 0.02; norms start at 1 and biases at 0. In a model that remembers no
    heads all are drawn. `given` maps parameter paths to values of an adapter, which fit.
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
    # What ZeRO-3 has partitioned holds no numbers, and such a base serves no other trial.
    if parameter.numel():
        parameter.data.copy_(value)

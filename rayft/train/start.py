"""What a run starts from: fresh adapters, or an adapter folder (`RunConfig.start`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import ConfigError
from rayft.methods.base import LayerShape, LoraFactors, MethodConfig
from rayft.models.inject import check_fits
from rayft.models.methods import method
from rayft.models.targets import linear_shapes
from rayft.squeeze.anneal import revive
from rayft.train.context import Session
from rayft.train.run import RunConfig

__all__ = ["Start", "read_start"]


@dataclass(frozen=True)
class Start:
    """Where a run starts; all is empty where it starts afresh."""

    modules: Mapping[str, LoraFactors] | None = None
    """Module path → factors."""
    heads: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Parameter path → value of a classification head."""
    content_hash: str = ""
    """Of the adapter as it lies on disk."""


def read_start(run: RunConfig, session: Session) -> Start:
    """Read the adapter that a run starts from, if it does, and check that it fits.

    Columns that are zero in both factors, which would never learn, get a row of A (`revive`).

    Raises:
        ArtifactError: if it can't be read, or was made for another base.
        ConfigError: if it has another rank than `method.rank`, or one that a layer can't hold.
    """
    if run.start is None:
        return Start()
    artifact, model = AdapterArtifact.load(session.home.local(run.start)), session.loaded.model
    check_fits(model, artifact, session.loaded.fingerprint)
    shapes, kind = linear_shapes(model), method(run.method.name)
    for name, factors in artifact.modules.items():
        most = kind.max_rank(LayerShape(*shapes[name]))
        if factors.rank > most:
            raise ConfigError(
                f"start: {run.start} has rank {factors.rank} at {name}, which needs no more than {most}: "
                f"bring it to rank {most} by `rayft squeeze` first"
            )
    # As with any setting, the default says nothing; but annealing has to know where it begins.
    said = run.method.rank != MethodConfig().rank or run.anneal is not None
    if said and artifact.rank != run.method.rank:
        raise ConfigError(
            f"start: {run.start} has rank {artifact.rank}, and method.rank is {run.method.rank}; set "
            f"method.rank: {artifact.rank}"
        )
    modules = {name: revive(factors) for name, factors in artifact.modules.items()}
    return Start(modules, artifact.heads, artifact.content_hash)

"""Checks that an adapter has to pass before it is served on a base."""

from __future__ import annotations

from dataclasses import dataclass

from rayft.artifacts import AdapterArtifact, ModuleShapes
from rayft.errors import ArtifactError

__all__ = ["BaseModel", "check_adapter", "check_artifact"]


@dataclass(frozen=True)
class BaseModel:
    """The properties of a base that an adapter must match."""

    name: str
    """Name of the base."""
    fingerprint: str
    """Fingerprint of its weights."""
    shapes: ModuleShapes
    """Shapes of its linear layers."""
    widest: int | None = None
    """Largest rank that can be served; None for no limit."""
    unserved: frozenset[str] = frozenset()
    """Linear layers that can't have adapters in the engine."""


def check_adapter(name: str, folder: str, base: BaseModel | None) -> AdapterArtifact:
    """Read an adapter, and refuse it if its answers would be wrong.

    Args:
        name: the name that it is to be served under.
        folder: the adapter's folder.
        base: the base that it must match; None if it is not loaded yet.

    Raises:
        ArtifactError: if the adapter is missing or damaged, contains NaN, has a classification head, has too
            large a rank, or is for layers that the engine does not adapt.
        BaseMismatchError: if it was trained on another base.
    """
    try:
        artifact = AdapterArtifact.load(folder)
        check_artifact(artifact, folder, base)
    except ArtifactError as error:
        raise type(error)(f"adapter '{name}' is not served: {error}") from error
    return artifact


def check_artifact(artifact: AdapterArtifact, folder: str, base: BaseModel | None) -> None:
    """Refuse an adapter in memory if its answers would be wrong.

    Args:
        artifact: the adapter.
        folder: where it comes from, for the message.
        base: the base that it must match; None if it is not loaded yet.

    Raises:
        ArtifactError: if the adapter has a classification head, has too large a rank, or is for layers that
            the engine does not adapt.
        BaseMismatchError: if it was trained on another base.
    """
    _check_generates(artifact, folder)
    if base is not None:
        artifact.check_base(base.fingerprint, base.shapes)
        _check_ranks(artifact, folder, base.widest)
        _check_layers(artifact, folder, base.unserved)


def _check_generates(artifact: AdapterArtifact, folder: str) -> None:
    if artifact.heads or artifact.meta.task != "causal_lm":
        raise ArtifactError(
            f"{folder} has a classification head and does not generate text; only adapters of "
            "language models can be served"
        )


def _check_ranks(artifact: AdapterArtifact, folder: str, widest: int | None) -> None:
    for path, factors in artifact.modules.items():
        if widest is not None and factors.rank > widest:
            raise ArtifactError(
                f"{folder}: {path} has rank {factors.rank}, but GPUs serve ranks up to {widest}; reduce it "
                f"by `rayft squeeze {folder} --rank {widest} --out DIR`"
            )


def _check_layers(artifact: AdapterArtifact, folder: str, unserved: frozenset[str]) -> None:
    if lacking := sorted(unserved & artifact.modules.keys()):
        raise ArtifactError(
            f"{folder}: vLLM can't add an adapter to {lacking[0]} of this model; train the adapter for other "
            "layers, or serve it with engine: cpu"
        )

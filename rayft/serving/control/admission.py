"""What an adapter must be to be served on a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rayft.artifacts import AdapterArtifact, ModuleShapes
from rayft.errors import ArtifactError, RayftError

__all__ = ["BaseModel", "check_adapter", "read_adapter"]


@dataclass(frozen=True)
class BaseModel:
    """What an adapter must fit."""

    name: str
    """The base's own name."""
    fingerprint: str
    """Identity of its weights."""
    shapes: ModuleShapes
    """Its linear layers."""
    widest: int | None = None
    """The largest rank that can be served; None where there is none."""


def check_adapter(name: str, folder: str, base: BaseModel | None) -> AdapterArtifact:
    """Read an adapter and check all that would make it answer wrongly (None: but for its base).

    Raises:
        ArtifactError: if it is missing, damaged, holds NaN, has a classification head, or too large a rank.
        BaseMismatchError: if it was made for another base.
    """
    try:
        artifact = read_adapter(folder)
        _check_generates(artifact, folder)
        if base is not None:
            artifact.check_base(base.fingerprint, base.shapes)
            _check_ranks(artifact, folder, base.widest)
    except ArtifactError as error:
        raise type(error)(f"adapter '{name}' is not served: {error}") from error
    return artifact


def read_adapter(folder: str | Path) -> AdapterArtifact:
    """Read an adapter that anyone may have written: an error of ours tells whatever is wrong with its files.

    Raises:
        ArtifactError: if it can't be read.
    """
    try:
        return AdapterArtifact.load(folder)
    except RayftError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"{folder} can't be read ({type(error).__name__}: {error}); export the adapter again"
        ) from error


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
                f"{folder}: {path} has rank {factors.rank}, and GPUs serve ranks up to {widest}; bring it "
                f"there with `rayft squeeze {folder} --rank {widest} --out DIR`"
            )

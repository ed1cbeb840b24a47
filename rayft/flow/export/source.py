"""What `rayft export` reads: an adapter from a folder or a registry, and the base that it is for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, BaseMismatchError, ModelError
from rayft.flow.squeeze.dense import dense_source
from rayft.flow.target import Place, at_rank
from rayft.models.base import base_of
from rayft.models.fingerprint import places, source_fingerprint
from rayft.models.inject import check_fits
from rayft.models.load import (
    REGISTERED,
    ModelConfig,
    is_here,
    load_skeleton,
    loading,
    resolve,
    whole_skeleton,
)
from rayft.registry.ref import AdapterRef

__all__ = ["Base", "Source", "find_base", "known_base", "open_source"]


@dataclass(frozen=True)
class Source:
    """An adapter, and where it comes from."""

    artifact: AdapterArtifact
    name: str
    """Name of its folder, or of the registered model, with the rank if it is at a lower one."""
    folder: Path | None
    """Folder of the whole adapter; None if it comes from a registry."""
    whole: bool = True
    """Whether it is the whole adapter, and not one of its lower ranks."""


@dataclass(frozen=True)
class Base:
    """The base that an adapter is for, without its weights."""

    config: ModelConfig
    skeleton: Any
    """The model on the meta device."""


def open_source(place: Place) -> Source:
    """Read the adapter at a place.

    Raises:
        ArtifactError: if the folder holds no plain LoRA, with what to do instead.
        SqueezeError: if it does not have the rank that is asked for.
    """
    folder = place.folder
    dense = dense_source(folder)
    if dense is not None and place.rank is None:
        what = "a whole model" if dense.whole else "an adapter without LoRA factors"
        raise ArtifactError(
            f"{folder} is {what}; extract a LoRA from it (rayft squeeze {folder} --base BASE --rank 16 --out "
            "DIR), and export that"
        )
    artifact = at_rank(place)
    name = AdapterRef.parse(place.name).name if place.registered else folder.resolve().name
    if place.rank is not None:
        name = f"{name}-r{place.rank}"
    return Source(artifact, name, None if place.registered else folder, whole=place.rank is None)


def find_base(artifact: AdapterArtifact, name: str | None) -> Base:
    """Return the base of an adapter, after checking that the adapter is for it.

    Args:
        artifact: the adapter.
        name: hub id, folder, GGUF file or registered name; the base that the adapter names if not given.

    Raises:
        ArtifactError: if neither names a base.
        ModelError: if it can't be found, or is stored quantised.
        BaseMismatchError: if the adapter is for another base.
    """
    config = base_of(artifact, name)
    if config is None:
        raise ArtifactError("the adapter names no base; name it with --base")
    return _checked(artifact, config)


def known_base(artifact: AdapterArtifact, name: str | None) -> Base | None:
    """Return what `find_base` does, or None if the configuration of the base is not on this machine.

    Raises:
        ModelError: if the base that `name` gives can't be read.
        BaseMismatchError: if the adapter is for another base.
    """
    for candidate in (name, artifact.meta.base_model):
        config = base_of(artifact, candidate) if candidate else None
        if config is None or not _is_here(config):
            if candidate == name and config is not None:
                # Refuses a name that no model can have, such as the path of a folder that is not there.
                resolve(config)
            continue
        try:
            skeleton = whole_skeleton(config)
        except ModelError:
            if candidate == name:
                raise
            # Nobody asked for the base that the adapter names.
            continue
        if skeleton is not None:
            return _checked(artifact, config)
    return None


def _checked(artifact: AdapterArtifact, config: ModelConfig) -> Base:
    """Return the base of a configuration, after checking that an adapter is for it."""
    base = _base(artifact, config)
    with loading(base.config):
        source = resolve(base.config)
        here = bool(places(source, base.config.revision, local=True))
        known = source_fingerprint(base.skeleton, source, base.config.revision) if here else None
    check_fits(base.skeleton, artifact, known or "")
    return base


def _is_here(config: ModelConfig) -> bool:
    """Return whether a base is on this machine, or in a GGUF file or a package from which it is converted."""
    path = Path(config.name).expanduser()
    converted = config.name in REGISTERED or (path.suffix == ".gguf" and path.is_file())
    return converted or is_here(config.name, config.revision)


def _base(artifact: AdapterArtifact, config: ModelConfig) -> Base:
    """Return the base; of a classifier, with as many classes as the adapter's head has."""
    if not artifact.heads:
        return Base(config, load_skeleton(config))
    counts = {value.shape[0] for value in artifact.heads.values() if value.ndim == 2 and value.shape[0] > 1}
    reason: BaseMismatchError | None = None
    for count in sorted(counts):
        sized = config.model_copy(update={"num_labels": count})
        skeleton = load_skeleton(sized)
        try:
            check_fits(skeleton, artifact)
        except BaseMismatchError as error:
            reason = error
        else:
            return Base(sized, skeleton)
    raise reason or BaseMismatchError("the adapter's head has no class; export it again")

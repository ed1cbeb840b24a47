"""The base that an adapter is for: by the name that the adapter stores, at the revision that it stores."""

from __future__ import annotations

from rayft.errors import ArtifactError
from rayft.models.load import ModelConfig
from rayft.peft.folder import Artifact

__all__ = ["base_of", "pinned"]


def base_of(adapter: Artifact, name: str | None = None) -> ModelConfig | None:
    """Return the base of an adapter, at the revision that it was trained on.

    Args:
        adapter: the adapter.
        name: a base to use in place of the one that the adapter names. The adapter's revision is not one of
            another base.

    Returns:
        The base with the adapter's task; None if there is no name.

    Raises:
        ArtifactError: if the adapter's name of its base can be the name of no model.
    """
    named = name or adapter.meta.base_model
    if not named:
        return None
    try:
        config = ModelConfig(name=named, task=adapter.meta.task)
    except ValueError as error:
        if name:
            raise
        raise ArtifactError(
            f"the adapter names the base {named!r}, which can be the name of no model: name it with --base"
        ) from error
    return pinned(config, adapter)


def pinned(config: ModelConfig, adapter: Artifact | None) -> ModelConfig:
    """Return a base at the revision that an adapter was trained on, where that says which revision it is.

    Args:
        config: the base; a revision that it names stays.
        adapter: the adapter, or None for no change.
    """
    if adapter is None or config.revision is not None or not adapter.revision:
        return config
    own = adapter.meta.base_model
    same = own == config.name or ModelConfig(name=own).located().name == config.located().name
    return config.model_copy(update={"revision": adapter.revision}) if same else config

"""Find what a target of `rayft eval` stands for: an adapter's folder, a registered adapter, or a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rayft.artifacts.meta import CONFIG_FILE
from rayft.errors import ArtifactError, SqueezeError
from rayft.flow.origin import find_folder
from rayft.models.load import ModelConfig, resolve
from rayft.paths import checked_text, read_path
from rayft.peft.folder import Artifact, PeftFolder, load_adapter
from rayft.registry.store import MlflowRegistry

__all__ = ["Target", "find_target"]

_RANKED = re.compile(r"(?P<text>models:/[^@]+(?:@[^@]+|/\d+)|(?!models:/).+)@r(?P<rank>\d+)")
"""A target with a rank. `models:/name@r4` is an alias."""


@dataclass(frozen=True)
class Target:
    """An adapter, or a model alone."""

    name: str
    """The name in the results: what the user wrote, with the rank."""
    folder: Path | None = None
    """Folder of the adapter; None for a model."""
    adapter: Artifact | None = None
    """The adapter, at the rank that was asked for; None for a model."""
    prefix: bool = False
    """Whether the adapter is a prefix of what the folder holds."""
    model: str = ""
    """Name of the model; empty for an adapter."""

    @property
    def content(self) -> str:
        """Content hash of the adapter; empty for a model."""
        return "" if self.adapter is None else self.adapter.content_hash


def find_target(text: str, rank: int | None, registry: str, scratch: Path) -> Target:
    """Return what a target stands for.

    Args:
        text: a folder of an adapter or of a model, the name of a model, or `models:/name@alias`. A rank may
            follow, as in `folder@r4` or `models:/name@alias@r4`.
        rank: the rank of the prefix of an adapter whose text names none; None for the whole adapter.
        registry: URI of MLflow, for `models:/…`.
        scratch: folder for what is fetched from the registry.

    Raises:
        ArtifactError: if an adapter can't be read, or a folder holds neither an adapter nor a model.
        ModelError: if there is no such model.
        RegistryError: if there is no such version or alias.
        SqueezeError: if a rank is asked for, and the adapter was never squeezed; or if the text names a rank,
            and the target is a model.
    """
    checked_text(text, "the target")
    if own := _RANKED.fullmatch(text):
        text, rank = own["text"], int(own["rank"])
    if text.startswith("models:/"):
        folder = MlflowRegistry(registry).fetch(text, scratch / "registry")
    else:
        folder = find_folder(read_path(text, "the target").absolute())
    if not (folder / CONFIG_FILE).is_file():
        if own:
            raise SqueezeError(f"{text} is no adapter, so it has no rank; leave out @r{rank}")
        return _model(text, folder)
    adapter = load_adapter(folder)
    if rank is None:
        return Target(text, folder, adapter)
    if isinstance(adapter, PeftFolder):
        raise SqueezeError(f"{text} has no factors, so it has no prefix of rank {rank}")
    return Target(f"{text}@r{rank}", folder, adapter.at_rank(rank), prefix=True)


def _model(text: str, folder: Path) -> Target:
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ArtifactError(
            f"{folder} holds neither an adapter ({CONFIG_FILE}) nor a model (config.json); give the folder "
            "that has one"
        )
    config = ModelConfig(name=text).located()
    resolve(config)
    return Target(text, model=config.name)

"""What names an adapter, and the contract of what keeps them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rayft.errors import RegistryError

__all__ = ["BASE_SCORE_TAG", "SCORE_TAG", "AdapterRef", "AdapterVersion", "Registry"]

SCORE_TAG = "val_score"
"""Tag of a version: its score on the validation part."""

BASE_SCORE_TAG = "base_val_score"
"""Tag of a version: the best score of the base, however prompted, on the same validation part."""

_SHAPE = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@:]+))?")


@dataclass(frozen=True)
class AdapterRef:
    """A pointer to an adapter; `Registry.resolve` fills what its text leaves open."""

    name: str
    """Name of the registered model."""
    version: int | None = None
    """Version; the newest one where neither this nor an alias is given."""
    alias: str | None = None
    """Alias that it was asked for by."""
    content_hash: str = ""
    """Identity of the adapter (`AdapterArtifact.content_hash`); empty until resolved."""
    uri: str = ""
    """Where its files are; empty until resolved."""

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Read `models:/name@alias`, `models:/name/3` or `models:/name`.

        Raises:
            RegistryError: if it is none of them.
        """
        found = _SHAPE.fullmatch(text)
        if found is None:
            raise RegistryError(
                f"'{text}' names no registered adapter; write models:/name@alias, models:/name/3 "
                "or models:/name"
            )
        version = int(found["version"]) if found["version"] else None
        return cls(found["name"], version, found["alias"])

    def __str__(self) -> str:
        if self.alias is not None:
            return f"models:/{self.name}@{self.alias}"
        return f"models:/{self.name}" + (f"/{self.version}" if self.version is not None else "")


@dataclass(frozen=True)
class AdapterVersion:
    """One version of a registered adapter."""

    name: str
    """Name of the registered model."""
    number: int
    """Version, from 1 on."""
    content_hash: str
    """Identity of the adapter."""
    uri: str
    """Where its files are."""
    run_id: str
    """The run that made it."""
    aliases: tuple[str, ...] = ()
    """Aliases that point to it."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Scores, method, rank, sizes, base and data."""

    def score(self, tag: str = SCORE_TAG) -> float | None:
        """Read a score from the tags; None if it is not there."""
        try:
            return float(self.tags[tag])
        except (KeyError, ValueError):
            return None


class Registry(Protocol):
    """Keeps adapters under names."""

    def register(self, name: str, run_id: str, folder: str | Path, tags: Mapping[str, str]) -> int:
        """Store an adapter folder as a new version, and give its number.

        The same content under the same name is the version that there is; its tags are updated.

        Args:
            name: registered model, made if missing.
            run_id: run that the files are kept with.
            folder: a PEFT LoRA folder.
            tags: what to note, `SCORE_TAG` and `BASE_SCORE_TAG` for the gate.

        Raises:
            ArtifactError: if the folder can't be loaded.
            PromotionRefusedError: if it holds a whole model.
            RegistryError: if the name or the run is not possible.
        """
        ...

    def resolve(self, ref: AdapterRef | str) -> AdapterRef:
        """Fill in version, content hash and place.

        Raises:
            RegistryError: naming the nearest name, version or alias that there is.
        """
        ...

    def fetch(self, ref: AdapterRef | str, folder: str | Path) -> Path:
        """Give a local adapter folder, `folder`/<content hash>, downloaded if it is not there yet.

        Raises:
            RegistryError: if it is not in the registry, or is no longer what was registered.
        """
        ...

    def alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias to a version.

        Raises:
            RegistryError: if there is no such model or version, or the alias is not possible.
        """
        ...

    def versions(self, name: str) -> Sequence[AdapterVersion]:
        """List the versions of a model, newest first.

        Raises:
            RegistryError: if there is no such model.
        """
        ...

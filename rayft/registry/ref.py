"""References to adapters, and the contract of a registry that keeps them."""

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
"""Tag of a version: the best score of the base, with any prompt, on the same validation part."""

_SHAPE = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@:]+))?")


@dataclass(frozen=True)
class AdapterRef:
    """A reference to an adapter. `Registry.resolve` fills the fields that its text does not have."""

    name: str
    """Name of the registered model."""
    version: int | None = None
    """Version. If neither this nor an alias is set, the newest version is meant."""
    alias: str | None = None
    """Alias in the text of the reference."""
    content_hash: str = ""
    """Identity of the adapter (`AdapterArtifact.content_hash`); empty until resolved."""
    uri: str = ""
    """Where its files are; empty until resolved."""

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Parse `models:/name@alias`, `models:/name/3` or `models:/name`.

        Raises:
            RegistryError: if the text has none of these forms.
        """
        found = _SHAPE.fullmatch(text)
        if found is None:
            raise RegistryError(
                f"'{text}' is not a reference to a registered adapter; write models:/name@alias, "
                "models:/name/3 or models:/name"
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
    """Version, counted from 1."""
    content_hash: str
    """Identity of the adapter."""
    uri: str
    """Where its files are."""
    run_id: str
    """The tracked run that trained it."""
    aliases: tuple[str, ...] = ()
    """Aliases that point to this version."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Scores, method, rank, sizes, base and data, as text."""

    def score(self, tag: str = SCORE_TAG) -> float | None:
        """Return a score from the tags, or None if there is no such tag."""
        try:
            return float(self.tags[tag])
        except (KeyError, ValueError):
            return None


class Registry(Protocol):
    """Keeps versions of adapters under names."""

    def register(
        self, name: str, run_id: str, folder: str | Path, tags: Mapping[str, str], about: str = ""
    ) -> int:
        """Store an adapter folder as a new version, and return its number.

        If a version under this name has the same content, no version is added: its tags are updated, and its
        number is returned.

        Args:
            name: the registered model, which is created if missing.
            run_id: the tracked run that the files are stored with.
            folder: a PEFT LoRA folder.
            tags: tags of the version; the gate reads `SCORE_TAG` and `BASE_SCORE_TAG`.
            about: what the version is, in words, for people.

        Raises:
            ArtifactError: if the folder can't be loaded.
            PromotionRefusedError: if the folder holds a whole model.
            RegistryError: if the name or the run is not valid.
        """
        ...

    def resolve(self, ref: AdapterRef | str) -> AdapterRef:
        """Return the reference with its version, content hash and URI.

        Raises:
            RegistryError: if there is no such name, version or alias; the message names the nearest one.
        """
        ...

    def fetch(self, ref: AdapterRef | str, folder: str | Path, most: int | None = None) -> Path:
        """Return the local adapter folder `folder`/<content hash>, and download it if it does not exist.

        Args:
            ref: the adapter.
            folder: where fetched adapters are.
            most: largest number of bytes that are downloaded; None for any number.

        Raises:
            ArtifactError: if the files have more bytes than `most`; nothing is downloaded then.
            RegistryError: if the adapter is not in the registry, or its files have changed since.
        """
        ...

    def alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias to a version.

        Raises:
            RegistryError: if there is no such model or version, or the alias is not valid.
        """
        ...

    def versions(self, name: str) -> Sequence[AdapterVersion]:
        """Return the versions of a model, newest first.

        Raises:
            RegistryError: if there is no such model.
        """
        ...

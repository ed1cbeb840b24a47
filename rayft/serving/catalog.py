"""Which names are served: each adapter is read, checked against the base, and only then loaded.

A name is the base (`base` or the base's own name), an adapter (`name`), or a squeezed adapter at a
lower rank (`name@r8`), which shares the adapter's tensors. What a name stands for may change while
requests run: those keep what they began with, and it is freed when the last of them ends.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch

from rayft.artifacts import AdapterArtifact, ModuleShapes, folder_bytes
from rayft.errors import ArtifactError, SqueezeError, UnknownModelError
from rayft.methods.base import LoraFactors
from rayft.serving.config import BASE_NAME
from rayft.serving.engine import Engine
from rayft.serving.messages import ModelCard

__all__ = ["BaseModel", "Catalog", "check_adapter"]


@dataclass(frozen=True)
class BaseModel:
    """What the catalog must know of the base."""

    name: str
    """The base's own name."""
    fingerprint: str
    """Identity of its weights."""
    shapes: ModuleShapes
    """Its linear layers."""


@dataclass
class _Entry:
    card: ModelCard
    artifact: AdapterArtifact
    key: str
    keys: set[str] = field(default_factory=set)
    leases: int = 0
    retired: bool = False


def check_adapter(name: str, folder: str, base: BaseModel) -> AdapterArtifact:
    """Read an adapter and check all that would make it answer wrongly.

    Raises:
        ArtifactError: if it is missing, damaged, holds NaN, or has a classification head.
        BaseMismatchError: if it was made for another base.
    """
    try:
        artifact = AdapterArtifact.load(folder)
        _check_generates(artifact, folder)
        artifact.check_base(base.fingerprint, base.shapes)
    except ArtifactError as error:
        raise type(error)(f"adapter '{name}' is not served: {error}") from error
    return artifact


def _check_generates(artifact: AdapterArtifact, folder: str) -> None:
    if artifact.heads or artifact.meta.task != "causal_lm":
        raise ArtifactError(
            f"{folder} has a classification head and does not generate text; only adapters of "
            "language models can be served"
        )


class Catalog:
    """The served names of one replica."""

    def __init__(self, base: BaseModel, engine: Engine, dtype: torch.dtype, device: str) -> None:
        self._base, self._engine = base, engine
        self._dtype, self._device = dtype, device
        self._entries: dict[str, _Entry] = {}
        self._versions = count()
        self.refused: str | None = None
        """Why the last change of adapters was refused; None if it was not."""

    async def sync(self, adapters: Mapping[str, str]) -> None:
        """Serve exactly these adapters (name → folder), touching none whose content is the same.

        Everything is checked before anything changes.

        Raises:
            ArtifactError: as `check_adapter`; what was served is served on.
        """
        try:
            checked = {
                name: await asyncio.to_thread(check_adapter, name, folder, self._base)
                for name, folder in adapters.items()
            }
        except ArtifactError as error:
            self.refused = str(error)
            raise
        self.refused = None
        for name in set(self._entries) - set(checked):
            self._retire(name)
        for name, artifact in checked.items():
            card = self._card(name, adapters[name], artifact)
            old = self._entries.get(name)
            if old is None or old.card != card:
                entry = self._load(card, artifact)
                self._retire(name)
                self._entries[name] = entry

    def cards(self) -> list[ModelCard]:
        """List the base and the adapters."""
        base = ModelCard(id=BASE_NAME, root=self._base.name)
        return [base, *(entry.card for entry in self._entries.values())]

    @contextmanager
    def lease(self, model: str) -> Iterator[str | None]:
        """Resolve a request's `model` and keep it loaded meanwhile: gives the engine's adapter name.

        Raises:
            UnknownModelError: if nothing is served under that name.
        """
        if model in (BASE_NAME, self._base.name):
            yield None
            return
        entry, key = self._resolve(model)
        entry.leases += 1
        try:
            yield key
        finally:
            entry.leases -= 1
            self._free(entry)

    def _resolve(self, model: str) -> tuple[_Entry, str]:
        found = re.fullmatch(r"(.+)@r(\d+)", model)
        name, rank = (found[1], int(found[2])) if found else (model, None)
        entry = self._entries.get(name)
        if entry is None:
            served = ", ".join([BASE_NAME, *self._entries])
            refused = f" (the last change was refused: {self.refused})" if self.refused else ""
            raise UnknownModelError(
                f"no model '{model}' is served here; served are {served}{refused}", param="model"
            )
        if rank is None:
            return entry, entry.key
        try:
            view = entry.artifact.at_rank(rank)
        except SqueezeError as error:
            raise UnknownModelError(f"'{model}' can't be served: {error}", param="model") from error
        if rank >= entry.artifact.rank:
            return entry, entry.key
        key = f"{entry.key}@r{rank}"
        if key not in entry.keys:
            self._engine.load(key, view.modules)
            entry.keys.add(key)
        return entry, key

    def _load(self, card: ModelCard, artifact: AdapterArtifact) -> _Entry:
        # Placed once: the engine's casts are then no copies, and every lower rank is a view.
        modules = {name: self._place(factors) for name, factors in artifact.modules.items()}
        placed = AdapterArtifact(modules=modules, meta=artifact.meta)
        key = f"{card.id}#{next(self._versions)}"
        self._engine.load(key, placed.modules)
        return _Entry(card, placed, key, {key})

    def _place(self, factors: LoraFactors) -> LoraFactors:
        b = factors.b.to(self._device, self._dtype)
        # A selector is served by its columns: its dense A stays where it is.
        a = factors.a if factors.columns else factors.a.to(self._device, self._dtype)
        return LoraFactors(a, b, factors.scale, factors.columns)

    def _retire(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            entry.retired = True
            self._free(entry)

    def _free(self, entry: _Entry) -> None:
        if entry.retired and not entry.leases:
            while entry.keys:
                self._engine.unload(entry.keys.pop())

    def _card(self, name: str, folder: str, artifact: AdapterArtifact) -> ModelCard:
        return ModelCard(
            id=name,
            root=str(Path(folder)),
            base=self._base.name,
            rank=artifact.rank,
            method=artifact.meta.method,
            parameters=artifact.parameters,
            bytes=folder_bytes(folder),
            content_hash=artifact.content_hash,
            parent=artifact.meta.parent or None,
            squeezed=artifact.squeezed,
        )

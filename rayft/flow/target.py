"""Find what a name stands for: an adapter in a folder or a registry, perhaps at a rank, or a model.

Every command that takes an adapter reads its name here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayft.artifacts import AdapterArtifact
from rayft.artifacts.meta import CONFIG_FILE
from rayft.errors import ArtifactError, ConfigError, SqueezeError
from rayft.flow.origin import find_folder, mlflow_uri
from rayft.models.base import base_of
from rayft.models.load import REGISTERED, ModelConfig, resolve
from rayft.paths import checked_text, read_path
from rayft.peft.folder import Artifact, PeftFolder, load_adapter
from rayft.registry.store import MlflowRegistry
from rayft.serving.messages import BASE_NAME
from rayft.squeeze.rank import squeeze

__all__ = [
    "Place",
    "Target",
    "at_rank",
    "base_among",
    "find_place",
    "find_target",
    "find_targets",
    "is_registered",
    "registry_uri",
    "remedy",
    "split_rank",
]

REGISTRY = "models:/"
"""How a reference to a registered adapter begins."""

_RANKED = re.compile(r"(?P<text>models:/[^@]+(?:@[^@]+|/\d+)|(?!models:/).+)@r(?P<rank>\d+)")
"""A name with a rank. `models:/name@r4` is an alias."""


@dataclass(frozen=True)
class Place:
    """Where an adapter or a model lies."""

    name: str
    """What the user wrote, without the rank."""
    folder: Path
    """Its folder, which may be missing; in an output folder, that of the winner or of the run's adapter."""
    rank: int | None
    """The rank that the user wrote; None for the whole adapter."""

    @property
    def registered(self) -> bool:
        """Whether it comes from a registry, so that its folder is a copy."""
        return is_registered(self.name)


@dataclass(frozen=True)
class Target:
    """An adapter, a model alone, or the base of the other target."""

    name: str
    """What the user wrote, with the rank."""
    adapter: Artifact | None = None
    """The adapter, at the rank that was asked for; None for a model and for `base`."""
    model: str = ""
    """Name of the model; empty for an adapter and for `base`."""

    @property
    def content(self) -> str:
        """Content hash of the adapter; empty if there is none."""
        return "" if self.adapter is None else self.adapter.content_hash

    @property
    def parent(self) -> str:
        """Content hash of the adapter that it was squeezed from; empty if there is none."""
        return "" if self.adapter is None else self.adapter.meta.parent

    @property
    def needs_base(self) -> bool:
        """Whether it is an adapter or `base`, and no model of its own."""
        return not self.model


def is_registered(text: str) -> bool:
    """Return whether a name is a reference to a registered adapter."""
    return text.startswith(REGISTRY)


def registry_uri(text: str, uri: str | None, sweep: Path | None = None) -> str:
    """Return the URI of the registry of `models:/…`, and an empty text for a name that needs none.

    Args:
        text: the name.
        uri: what the user gave as `--uri`.
        sweep: folder of a sweep whose registry is meant if there is no `uri`.

    Raises:
        ConfigError: if there is a `uri`, and the name is no reference to a registered adapter.
        TrackingError: as `mlflow_uri`.
    """
    if uri is not None:
        checked_text(uri, "--uri")
    if is_registered(text):
        return mlflow_uri(uri, sweep)
    if uri is not None:
        raise ConfigError(f"--uri is for models:/…, and {text} is none: leave it out")
    return ""


def split_rank(text: str) -> tuple[str, int | None]:
    """Split `folder@r4` or `models:/name@alias@r4` into the name and the rank; None if it names no rank."""
    # A folder may have such a name itself.
    if (found := _RANKED.fullmatch(text)) and not Path(text).is_dir():
        return found["text"], int(found["rank"])
    return text, None


def find_targets(texts: Sequence[str], rank: int | None, registry: str, scratch: Path) -> list[Target]:
    """Return what names stand for; arguments and errors are those of `find_target`.

    Raises:
        SqueezeError: if a rank is given, and no name needs it: each is a model, or names its own.
    """
    found = [find_target(text, rank, registry, scratch) for text in texts]
    adapters = [text for text, target in zip(texts, found, strict=True) if target.adapter is not None]
    if rank is not None and not adapters:
        raise SqueezeError(f"{texts[0]} is no adapter, so it has no rank; leave out --rank")
    if rank is not None and all(split_rank(text)[1] is not None for text in adapters):
        raise SqueezeError(f"{adapters[0]} names its rank; leave that out, or --rank {rank}")
    return found


def find_place(text: str, registry: str, scratch: Path) -> Place:
    """Return where an adapter or a model lies. What comes from a registry is fetched; nothing else is read.

    Args:
        text: as in `find_target`.
        registry: URI of MLflow, for `models:/…`.
        scratch: folder for what is fetched from the registry.

    Raises:
        ConfigError: if the text can't be a path.
        RegistryError: if there is no such version or alias.
    """
    checked_text(text, "the target")
    name, rank = split_rank(text)
    if is_registered(name):
        return Place(name, MlflowRegistry(registry).fetch(name, scratch / "registry"), rank)
    return Place(name, find_folder(read_path(name, "the target")), rank)


def find_target(text: str, rank: int | None, registry: str, scratch: Path) -> Target:
    """Return what a name stands for.

    Args:
        text: a folder of an adapter or of a model, the output folder of a sweep or run, the name of a model,
            `models:/name@alias`, or `base` for the base of another target. A rank may follow, as in
            `folder@r4` or `models:/name@alias@r4`.
        rank: the rank of an adapter whose text names none; None for the whole adapter.
        registry: URI of MLflow, for `models:/…`.
        scratch: folder for what is fetched from the registry.

    Raises:
        ArtifactError: if an adapter can't be read, or a folder holds neither an adapter nor a model.
        ModelError: if there is no such model.
        RegistryError: if there is no such version or alias.
        SqueezeError: if the adapter does not have the rank, or what the text names with a rank is no adapter.
    """
    place = find_place(text, registry, scratch)
    folder = place.folder.absolute()
    if not (folder / CONFIG_FILE).is_file():
        _check_whole(place)
        is_base = place.name == BASE_NAME and not folder.is_dir()
        return Target(text, model="" if is_base else _model(place.name, folder))
    adapter = load_adapter(folder)
    rank = rank if place.rank is None else place.rank
    if rank is None:
        return Target(text, adapter)
    return Target(f"{place.name}@r{rank}", _ranked(place.name, adapter, rank))


def at_rank(place: Place) -> AdapterArtifact:
    """Return the LoRA that lies at a place, at the rank that the place names.

    Raises:
        ArtifactError: if there is none, or it can't be read.
        SqueezeError: if it does not have the rank, or what has been given a rank is no LoRA.
    """
    if place.rank is None:
        return AdapterArtifact.load(place.folder)
    if place.folder.is_dir() and not (place.folder / CONFIG_FILE).is_file():
        _check_whole(place)
    adapter = _ranked(place.name, load_adapter(place.folder), place.rank)
    assert isinstance(adapter, AdapterArtifact)
    return adapter


def _check_whole(place: Place) -> None:
    """Refuse a rank of what is no adapter."""
    if place.rank is None:
        return
    without = f"leave out @r{place.rank}"
    if place.name not in REGISTERED and not place.folder.exists():
        raise SqueezeError(
            f"there is no folder {place.name}, and only an adapter has a rank: correct the path, or {without}"
        )
    raise SqueezeError(f"{place.name} is no adapter, so it has no rank; {without}")


def base_among(targets: Sequence[Target]) -> ModelConfig | None:
    """Return the base that the first adapter among targets names; None if none names one."""
    adapters = (target.adapter for target in targets if target.adapter is not None)
    return next((found for adapter in adapters if (found := base_of(adapter))), None)


def remedy(adapter: PeftFolder) -> str:
    """Return what to do where an adapter without factors can't be used."""
    if adapter.config.get("use_dora"):
        return "the update of DoRA has full rank, so train lora (or peft:PiSSA, peft:MiSS) instead"
    return "extract a LoRA from it by `rayft squeeze`"


def _ranked(place: str, adapter: Artifact, rank: int) -> Artifact:
    """Return an adapter at a rank up to its own; one that was never squeezed is squeezed in memory."""
    if isinstance(adapter, PeftFolder):
        raise SqueezeError(f"{place} has no factors, so it has no lower ranks; {remedy(adapter)}")
    if not 1 <= rank <= adapter.rank:
        raise SqueezeError(f"{place} has rank {adapter.rank}; ask for 1 to {adapter.rank}, not {rank}")
    return adapter if rank == adapter.rank else squeeze(adapter, rank=rank)


def _model(text: str, folder: Path) -> str:
    """Return the name of a model, after checking that there is one."""
    if text not in REGISTERED and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ArtifactError(
                f"{folder} holds neither an adapter ({CONFIG_FILE}) nor a model (config.json); give the "
                "folder that has one"
            )
        # In the output folder of a sweep it is the winner's.
        text = str(folder)
    config = ModelConfig(name=text).located()
    resolve(config)
    return config.name

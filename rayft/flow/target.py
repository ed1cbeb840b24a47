"""Find what a name stands for in `rayft eval` and `rayft chat`: an adapter, perhaps at a rank, or a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayft.artifacts.meta import CONFIG_FILE
from rayft.errors import ArtifactError, SqueezeError
from rayft.flow.origin import find_folder
from rayft.models.base import base_of
from rayft.models.load import REGISTERED, ModelConfig, resolve
from rayft.paths import checked_text, read_path
from rayft.peft.folder import Artifact, PeftFolder, load_adapter
from rayft.registry.store import MlflowRegistry
from rayft.serving.messages import BASE_NAME
from rayft.squeeze.rank import squeeze

__all__ = ["Target", "base_among", "find_target", "find_targets", "remedy", "split_rank"]

_RANKED = re.compile(r"(?P<text>models:/[^@]+(?:@[^@]+|/\d+)|(?!models:/).+)@r(?P<rank>\d+)")
"""A name with a rank. `models:/name@r4` is an alias."""


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
    checked_text(text, "the target")
    place, own = split_rank(text)
    if place.startswith("models:/"):
        folder = MlflowRegistry(registry).fetch(place, scratch / "registry")
    else:
        folder = find_folder(read_path(place, "the target").absolute())
    if not (folder / CONFIG_FILE).is_file():
        if own is not None:
            raise SqueezeError(f"{place} is no adapter, so it has no rank; leave out @r{own}")
        is_base = place == BASE_NAME and not folder.is_dir()
        return Target(text, model="" if is_base else _model(place, folder))
    adapter = load_adapter(folder)
    rank = rank if own is None else own
    if rank is None:
        return Target(text, adapter)
    return Target(f"{place}@r{rank}", _at_rank(place, adapter, rank))


def base_among(targets: Sequence[Target]) -> ModelConfig | None:
    """Return the base that the first adapter among targets names; None if none names one."""
    adapters = (target.adapter for target in targets if target.adapter is not None)
    return next((found for adapter in adapters if (found := base_of(adapter))), None)


def remedy(adapter: PeftFolder) -> str:
    """Return what to do where an adapter without factors can't be used."""
    if adapter.config.get("use_dora"):
        return "the update of DoRA has full rank, so train lora (or peft:PiSSA, peft:MiSS) instead"
    return "extract a LoRA from it by `rayft squeeze`"


def _at_rank(place: str, adapter: Artifact, rank: int) -> Artifact:
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

"""Where `rayft export` writes: every place is checked before the first is written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from rayft.artifacts import check_replaceable
from rayft.errors import ArtifactError, ConfigError
from rayft.flow.export.gguf import ADAPTER_KEY
from rayft.paths import check_folder

__all__ = ["CARD_FILE", "CARD_MARK", "MERGE_FILE", "Places", "check_places"]

CARD_FILE = "README.md"
CARD_MARK = "<!-- written by rayft export -->"
"""Line of a card by which it is known as rayft's."""
MERGE_FILE = "rayft_merge.json"
"""File in the folder of a merged model: its adapter, its base, what rounding lost, and the folder's files."""
HEAD = 2**16
"""Bytes of a file in which its mark is looked for."""


@dataclass(frozen=True)
class Places:
    """Where each form of an adapter is written; None for those that were not asked for."""

    merged: Path | None = None
    """Folder of the merged model."""
    vllm: Path | None = None
    """Adapter folder for vLLM and PEFT."""
    gguf: Path | None = None
    """File for llama.cpp."""
    card: Path | None = None
    """File of the model card, or the folder for it, where it is called `README.md`."""

    @property
    def card_file(self) -> Path | None:
        """The file of the card."""
        if self.card is None or (self.card.suffix.lower() == ".md" and not self.card.is_dir()):
            return self.card
        return self.card / CARD_FILE

    @property
    def card_in_vllm(self) -> bool:
        """Whether the card is the `README.md` of the folder for vLLM."""
        if self.card_file is None or self.vllm is None:
            return False
        return self.card_file.resolve() == (self.vllm / CARD_FILE).resolve()


def check_places(places: Places, source: Path | None, *, overwrite: bool) -> None:
    """Check that everything can be written, and that nothing is replaced that rayft did not export.

    Args:
        places: the places.
        source: folder of the adapter, which stays as it is.
        overwrite: whether what an earlier export has written is replaced.

    Raises:
        ConfigError: if there are no places, they overlap, or something is there without `overwrite`.
        ArtifactError: if something is there that no export has written.
        ResourceError: if a place can't be written.
    """
    card = None if places.card_in_vllm else places.card_file
    wanted = {"--merged": places.merged, "--vllm": places.vllm, "--gguf": places.gguf, "--card": card}
    chosen = {flag: place for flag, place in wanted.items() if place is not None}
    if not chosen:
        raise ConfigError(
            "nothing to export: add --merged DIR (a whole model), --vllm DIR (an adapter for vLLM and PEFT), "
            "--gguf FILE (for llama.cpp) or --card FILE (a model card)"
        )
    _check_apart(chosen, source)
    for flag, place in chosen.items():
        check_folder(place.absolute().parent, flag)
        if os.path.lexists(place):
            _check_replaceable(flag, place, overwrite)


def _check_apart(chosen: dict[str, Path], source: Path | None) -> None:
    """Refuse places that are in each other, and folders that are, contain or lie in the source."""
    found = [(flag, place.resolve()) for flag, place in chosen.items()]
    for index, (flag, place) in enumerate(found):
        for other, second in found[index + 1 :]:
            if place == second or place in second.parents or second in place.parents:
                raise ConfigError(
                    f"{flag} {chosen[flag]} and {other} {chosen[other]} are one place, or one is in the "
                    "other; choose places beside each other (a card may be the README.md of --vllm's folder)"
                )
        if source is None or flag in ("--gguf", "--card"):
            continue
        own = source.resolve()
        if place == own or place in own.parents or own in place.parents:
            raise ConfigError(
                f"{flag} {chosen[flag]} would be written over or into the adapter {source}, which stays as "
                "it is; choose another folder"
            )


def _check_replaceable(flag: str, place: Path, overwrite: bool) -> None:
    folder = flag in ("--merged", "--vllm")
    if folder and place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"{flag} {place} exists already; choose another place, or replace what an earlier export wrote "
            "there with --overwrite"
        )
    if flag == "--vllm":
        ours = place.is_dir() and _holds(place / CARD_FILE, CARD_MARK)
        check_replaceable(place, (CARD_FILE,) if ours else ())
    elif flag == "--merged":
        _check_merged(place)
    elif not _holds(place, ADAPTER_KEY if flag == "--gguf" else CARD_MARK):
        raise ArtifactError(
            f"{flag} {place} is no file that rayft exported, so it is not replaced; choose another place"
        )


def _check_merged(place: Path) -> None:
    """Refuse to replace anything but a folder that holds just what an export has written."""
    try:
        written = json.loads((place / MERGE_FILE).read_text(encoding="utf-8"))["files"]
        found = {str(path.relative_to(place)) for path in place.rglob("*") if not path.is_dir()}
        strangers = sorted(found - {*written, MERGE_FILE})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"--merged {place} is no folder of a model that rayft merged (it has no {MERGE_FILE}), so it is "
            "not replaced; choose another place"
        ) from error
    if place.is_symlink() or strangers:
        what = "is a link" if place.is_symlink() else f"also holds {', '.join(strangers[:3])}"
        raise ArtifactError(
            f"--merged {place} {what}, which rayft did not write, so it is not replaced; move that away, or "
            "choose another place"
        )


def _holds(file: Path, mark: str) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    with file.open("rb") as stream:
        return mark.encode() in stream.read(HEAD)

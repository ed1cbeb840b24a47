"""Where a squeeze writes: what is there already is checked before anything is computed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from rayft.artifacts import CONFIG_FILE, check_replaceable, contains
from rayft.errors import ArtifactError, SqueezeError

__all__ = ["check_places", "files_digest"]

SAMPLE = 2**16
"""Bytes that are hashed of each end of a file of weights."""


def check_places(source: Path, out: Path, marks: Mapping[str, str], parent: str, overwrite: bool) -> None:
    """Refuse to write where something would be lost.

    Args:
        source: what is squeezed, which stays as it is.
        out: folder of the results.
        marks: name of each folder that may be written in it → what it is marked with.
        parent: content hash of the adapter that the results are squeezed from; marks of older versions.
        overwrite: whether adapters that rayft made otherwise are replaced.

    Raises:
        SqueezeError: if a folder is, contains or lies in the source, or another command made it.
        ArtifactError: if rayft did not make what is there.
        ResourceError: if the folder can't be made.
    """
    for label, mark in marks.items():
        place = out / label
        if contains(source, place) or (place.exists() and contains(place, source)):
            raise SqueezeError(
                f"{place} would be written over or into the source {source}, which stays as it is; choose "
                "another folder with --out"
            )
        try:
            found = check_replaceable(place)
        except ArtifactError as error:
            raise ArtifactError(f"--out {out}: {error}") from error
        if found is None or overwrite:
            continue
        # Adapters of 0.1.0 only say what they were squeezed from.
        same = found["made"] == mark if found.get("made") else bool(parent) and found.get("parent") == parent
        if not same:
            raise SqueezeError(
                f"{place} holds an adapter that this command did not make from this source; choose another "
                "folder with --out, or replace it with --overwrite"
            )


def files_digest(folder: Path) -> str:
    """Hash (16 hex digits) the ends of a folder's files of weights, and the configuration beside them."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / CONFIG_FILE]):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name}\0{size}\0".encode() + file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]

"""Restricts the places from which clients may load adapters to the server's roots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from rayft.errors import BadRequestError

__all__ = ["FILES", "check_allowed"]

FILES = ("adapter_config.json", "adapter_model.safetensors", "rayft.json")
"""The files of an adapter folder that are read; others are not fetched."""


def check_allowed(source: str, roots: Sequence[str]) -> None:
    """Refuse a source that clients may not load.

    Raises:
        BadRequestError: if the source is outside all roots, by its path or by a symbolic link.
    """
    if "\0" in source:
        raise BadRequestError("a source can't contain NUL", param="source")
    if source.startswith("models:/"):
        return
    source, *roots = map(_path, (source, *roots))
    if "://" in source:
        # Stores and servers decode `%2e%2e` to `..`, and `%2f` to a slash.
        clean = unquote(source.split("://", 1)[1])
        inside = any(source.startswith(root.rstrip("/") + "/") for root in roots if "://" in root)
        if not inside or ".." in clean.split("/"):
            raise BadRequestError(f"{source} is below none of the server's roots", param="source")
        return
    try:
        folder = Path(source).expanduser()
    except RuntimeError as error:
        raise BadRequestError(f"{source} has an unknown home directory: {error}", param="source") from error
    if not folder.is_absolute():
        raise BadRequestError(f"{source} is not an absolute path", param="source")
    allowed = [Path(root).expanduser().resolve() for root in roots if "://" not in root]
    # Links are resolved, those of single files too.
    places = [_target(folder), *(_target(folder / name) for name in FILES)]
    if not all(any(place.is_relative_to(root) for root in allowed) for place in places):
        raise BadRequestError(f"{source} is below none of the server's roots", param="source")


def _path(place: str) -> str:
    """Return the path in a URL of the local disk, whose links are resolved too; any other place as it is."""
    return place.removeprefix("file://").removeprefix("local://")


def _target(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise BadRequestError(f"{path} can't be read: {error}", param="source") from error

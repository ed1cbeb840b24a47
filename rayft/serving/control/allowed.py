"""Restricts the places from which clients may load adapters to the server's roots."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from rayft.errors import BadRequestError

__all__ = ["FILES", "check_allowed"]

FILES = ("adapter_config.json", "adapter_model.safetensors", "rayft.json")
"""The files of an adapter folder that are read; others are not fetched."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LOCAL = re.compile(r"(?:file|local)://")
"""How fsspec's URLs of local folders begin."""


def check_allowed(source: str, roots: Sequence[str]) -> None:
    """Refuse a source that clients may not load.

    Raises:
        BadRequestError: if the source is outside all roots, by its path or by a symbolic link.
    """
    if _CONTROL.search(source):
        raise BadRequestError("a source can't contain control characters", param="source")
    if source.startswith("models:/"):
        return
    outside = BadRequestError(f"{source} is below none of the server's roots", param="source")
    if "://" in source:
        if not any(_below(source, root) for root in roots if "://" in root):
            raise outside
        if not _LOCAL.match(source):
            return
    # A URL of a local folder may lead out of a root by a link, as a path may.
    source, roots = _LOCAL.sub("", source, count=1), [_LOCAL.sub("", root, count=1) for root in roots]
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
        raise outside


def _below(url: str, root: str) -> bool:
    """Return whether a URL is below the URL of a root, however stores and servers read it."""
    start = root.rstrip("/") + "/"
    if not url.startswith(start):
        return False
    rest = url.removeprefix(start)
    # Servers decode `%2e%2e` to `..`, and proxies before them may have decoded it once already.
    while (decoded := unquote(rest)) != rest:
        rest = decoded
    # Clients of HTTP remove tabs and newlines, and leave the path at `?` and `#`; fsspec reads `::` as a
    # chain of URLs.
    return not _CONTROL.search(rest) and "::" not in rest and ".." not in re.split(r"[/\\?#]", rest)


def _target(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise BadRequestError(f"{path} can't be read: {error}", param="source") from error

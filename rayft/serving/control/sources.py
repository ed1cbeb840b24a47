"""Finds adapters in folders, in MLflow's registry, and at URLs that fsspec reads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from typing import Any

from rayft.artifacts import AdapterArtifact, holds, settle
from rayft.artifacts.lora_settings import read_settings
from rayft.artifacts.meta import CONFIG_FILE
from rayft.errors import ArtifactError, BadRequestError, DiskFullError
from rayft.files import room_on
from rayft.paths import check_folder
from rayft.registry.ref import AdapterRef, Registry
from rayft.serving.control.admission import BaseModel, check_adapter
from rayft.serving.control.allowed import FILES
from rayft.serving.control.state import Deployed
from rayft.squeeze.budget import parse_bytes

__all__ = ["check_source", "find", "followed", "moved", "registry_at"]

NO_REGISTRY = (
    "this server was started without a registry; set registry to MLflow's URI in its configuration, "
    "and start it again"
)


def registry_at(uri: str | None) -> Registry | None:
    """Return the registry of a server's configuration, if it names one. MLflow is imported only then."""
    if not uri:
        return None
    from rayft.registry.store import MlflowRegistry

    return MlflowRegistry(uri)


def find(
    name: str,
    source: str,
    registry: Registry | None,
    fetched: str | Path,
    max_bytes: str,
    *,
    pinned: bool,
    base: BaseModel | None = None,
) -> Deployed:
    """Fetch the adapter of a source into a folder of this node, unless it is in one, and check it.

    Args:
        name: the name that it is to be served under.
        source: a folder, `models:/name@alias`, `models:/name/3`, or a URL.
        registry: the registry, if one is configured.
        fetched: folder for what is fetched.
        max_bytes: largest size of the adapter, such as `2GB`.
        pinned: whether it is to stay on the device.
        base: the base that it must match; None if it is not loaded yet.

    Returns:
        The version; its number is 0 unless the registry has one.

    Raises:
        ArtifactError: if it is missing, damaged, larger than `max_bytes`, or for another base.
        RegistryError: if the registry doesn't have it.
        BadRequestError: if there is no registry.
    """
    version = 0
    aliases: tuple[str, ...] = ()
    score: float | None = None
    if source.startswith("models:/"):
        if registry is None:
            raise BadRequestError(NO_REGISTRY, param="source")
        check_folder(Path(fetched).expanduser(), "fetched")
        ref, aliases, score = _registered(source, registry)
        folder, version = registry.fetch(ref, fetched, parse_bytes(max_bytes)), ref.version or 0
    elif "://" in source:
        folder = _fetch(source, Path(fetched), parse_bytes(max_bytes))
    else:
        folder = _folder(source, f"adapter '{name}' is not served: ")
    _check_size(folder, max_bytes)
    content = check_adapter(name, str(folder), base).content_hash
    return Deployed(name, version, str(folder), content, source, aliases, pinned, score)


def moved(deployed: Deployed, registry: Registry) -> bool:
    """Return whether a followed source now denotes another version; no adapter is read."""
    ref, aliases, score = _registered(deployed.source, registry)
    known = (deployed.version, deployed.content_hash, deployed.aliases, deployed.score)
    return (ref.version, ref.content_hash, aliases, score) != known


def _registered(source: str, registry: Registry) -> tuple[AdapterRef, tuple[str, ...], float | None]:
    """Resolve a reference; return it with the aliases and the validation score of its version."""
    ref = registry.resolve(AdapterRef.parse(source))
    mine = next((one for one in registry.versions(ref.name) if one.number == ref.version), None)
    return (ref, mine.aliases, mine.score()) if mine else (ref, (), None)


def followed(source: str) -> bool:
    """Return whether a source may denote another adapter later, because it names an alias."""
    return source.startswith("models:/") and AdapterRef.parse(source).version is None


def _check_size(folder: Path, max_bytes: str) -> None:
    """Check the size of an adapter's files before any of them is read.

    Raises:
        ArtifactError: if they are larger than `max_bytes`.
    """
    size = sum(path.stat().st_size for name in FILES if (path := folder / name).is_file())
    if size > parse_bytes(max_bytes):
        raise ArtifactError(
            f"{folder} has {size:,} bytes, more than the {max_bytes} that this server accepts; squeeze it, "
            "or raise max_adapter_bytes"
        )


def check_source(source: str, registry: Registry | None, fetched: Path, max_bytes: str) -> None:
    """Check that a source has an adapter's files and that they can be fetched, without reading weights.

    Raises:
        ArtifactError, RegistryError: if the adapter is missing.
        ResourceError: if the folder for fetched adapters can't be written.
        BadRequestError: if there is no registry.
    """
    remote = source.startswith("models:/") or "://" in source
    if remote:
        check_folder(fetched, "fetched")
    if source.startswith("models:/"):
        if registry is None:
            raise BadRequestError(NO_REGISTRY, param="source")
        _registered(source, registry)
    elif remote:
        with _store(source):
            _files_of(source, parse_bytes(max_bytes))
    else:
        read_settings(_folder(source))


def _folder(source: str, prefix: str = "") -> Path:
    """Return the absolute path of a folder on this node.

    Args:
        source: its path.
        prefix: text before the message of an error.

    Raises:
        ArtifactError: if the folder does not exist; the message names this node.
    """
    folder = Path(source).expanduser().absolute()
    if not folder.exists():
        raise ArtifactError(
            f"{prefix}{folder} does not exist on {gethostname()}; correct the path. A cluster of several "
            "nodes reads folders on its head; name adapters that are elsewhere as models:/NAME/VERSION or "
            "by a URL"
        )
    return folder


def _fetch(url: str, fetched: Path, most: int) -> Path:
    """Copy an adapter's files from a URL to `fetched`/<content hash>."""
    fetched = fetched.expanduser().absolute()
    check_folder(fetched, "fetched")
    with room_on(fetched):
        fetched.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".fetch-", dir=fetched))
    try:
        with _store(url):
            files, root, names = _files_of(url, most)
            limit = _limit(url, most)
            for name in names:
                with room_on(fetched):
                    files.get_file(f"{root}/{name}", str(staging / name), callback=limit)
        content = AdapterArtifact.load(staging).content_hash
        target = fetched / content
        if not holds(target, content) and not settle(staging, target):
            raise ArtifactError(
                f"{target} can't be written; remove what is there, or set another folder (fetched)"
            )
        return target
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _store(url: str) -> Iterator[None]:
    """Turn all errors of a store into `ArtifactError`: stores have their own, and not all are OSErrors."""
    try:
        yield
    except (ArtifactError, DiskFullError):
        raise
    except Exception as error:
        raise ArtifactError(f"{url} can't be read: {error}") from error


def _files_of(url: str, most: int) -> tuple[Any, str, list[str]]:
    """Find the files of an adapter at a URL; return their file system, folder and names."""
    import fsspec

    files, root = fsspec.core.url_to_fs(url)
    sizes = {name: files.size(f"{root}/{name}") for name in FILES if files.exists(f"{root}/{name}")}
    if CONFIG_FILE not in sizes:
        raise ArtifactError(f"{url} has no {CONFIG_FILE}; use the URL of a folder that PEFT saved")
    _limit(url, most).relative_update(sum(size or 0 for size in sizes.values()))
    return files, root, [*sizes]


def _limit(url: str, most: int) -> Any:
    """Return a callback that ends a download of more bytes: a store may tell no size, or a wrong one."""
    from fsspec.callbacks import Callback

    def check(_: int | None, value: int, **__: object) -> None:
        if value > most:
            raise ArtifactError(f"{url} is larger than the {most:,} bytes that this server accepts")

    return Callback(hooks={"limit": check})

"""Where adapters come from: folders, MLflow's registry, and whatever fsspec reads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from typing import Any

from rayft.artifacts import settle
from rayft.artifacts.lora_settings import read_settings
from rayft.artifacts.meta import CONFIG_FILE
from rayft.errors import ArtifactError, BadRequestError, DiskFullError
from rayft.files import room_on
from rayft.paths import check_folder
from rayft.registry.ref import AdapterRef, Registry
from rayft.serving.control.admission import BaseModel, check_adapter, read_adapter
from rayft.serving.control.allowed import FILES
from rayft.serving.control.state import Deployed
from rayft.squeeze.budget import parse_bytes

__all__ = ["check_source", "find", "followed", "moved"]


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
    """Bring a source's adapter into a folder and say which it is; a version of 0 is still to be given.

    Raises:
        ArtifactError: if it is missing, damaged, larger than `max_bytes`, or not for `base`.
        RegistryError: if the registry doesn't have it.
        BadRequestError: if there is no registry.
    """
    version = 0
    aliases: tuple[str, ...] = ()
    score: float | None = None
    if source.startswith("models:/"):
        if registry is None:
            raise BadRequestError("this server was started without a registry", param="source")
        check_folder(Path(fetched).expanduser(), "fetched")
        ref, aliases, score = _registered(source, registry)
        folder, version = registry.fetch(ref, fetched), ref.version or 0
    elif "://" in source:
        folder = _fetch(source, Path(fetched), parse_bytes(max_bytes))
    else:
        folder = _folder(source, f"adapter '{name}' is not served: ")
    check_size(folder, max_bytes)
    content = check_adapter(name, str(folder), base).content_hash
    return Deployed(name, version, str(folder), content, source, aliases, pinned, score)


def moved(deployed: Deployed, registry: Registry) -> bool:
    """Say whether a followed source means something else by now, without reading an adapter."""
    ref, aliases, score = _registered(deployed.source, registry)
    known = (deployed.version, deployed.content_hash, deployed.aliases, deployed.score)
    return (ref.version, ref.content_hash, aliases, score) != known


def _registered(source: str, registry: Registry) -> tuple[AdapterRef, tuple[str, ...], float | None]:
    """Resolve a reference: with its version's aliases and validation score."""
    ref = registry.resolve(AdapterRef.parse(source))
    mine = next((one for one in registry.versions(ref.name) if one.number == ref.version), None)
    return (ref, mine.aliases, mine.score()) if mine else (ref, (), None)


def followed(source: str) -> bool:
    """Say whether a source may come to mean another adapter by itself."""
    return source.startswith("models:/") and AdapterRef.parse(source).version is None


def check_size(folder: Path, max_bytes: str) -> None:
    """Refuse a folder whose files are larger than allowed, before any is read.

    Raises:
        ArtifactError: if they are.
    """
    size = sum(path.stat().st_size for name in FILES if (path := folder / name).is_file())
    if size > parse_bytes(max_bytes):
        raise ArtifactError(
            f"{folder} has {size:,} bytes, more than the {max_bytes} that this server takes; squeeze it, or "
            "raise max_adapter_bytes"
        )


def check_source(source: str, registry: Registry | None, fetched: Path, max_bytes: str) -> None:
    """Check that a source has an adapter's files and that they can be brought here, without reading weights.

    Raises:
        ArtifactError, RegistryError: if there is none.
        ResourceError: if it would be brought to a folder that can't be written.
        BadRequestError: if there is no registry.
    """
    remote = source.startswith("models:/") or "://" in source
    if remote:
        check_folder(fetched, "fetched")
    if source.startswith("models:/"):
        if registry is None:
            raise BadRequestError("this server was started without a registry", param="source")
        _registered(source, registry)
    elif remote:
        with _store(source):
            _files_of(source, parse_bytes(max_bytes))
    else:
        read_settings(_folder(source))


def _folder(source: str, told: str = "") -> Path:
    """Return a folder that exists on this node.

    Args:
        source: its path.
        told: what an error begins with.

    Raises:
        ArtifactError: naming this node, if there is none.
    """
    folder = Path(source).expanduser().absolute()
    if not folder.exists():
        raise ArtifactError(
            f"{told}{folder} does not exist on {gethostname()}; correct the path. A cluster of several nodes "
            "reads folders on its head: name adapters that are elsewhere as models:/NAME/VERSION or by a URL"
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
            for name in names:
                with room_on(fetched):
                    files.get_file(f"{root}/{name}", str(staging / name))
        target = fetched / read_adapter(staging).content_hash
        if not target.is_dir() and not settle(staging, target):
            raise ArtifactError(f"{target} can't be written; free it or give another folder (fetched)")
        return target
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _store(url: str) -> Iterator[None]:
    """Turn the errors of a store into ours: each has its own, and botocore's are no OSErrors."""
    try:
        yield
    except (ArtifactError, DiskFullError):
        raise
    except Exception as error:
        raise ArtifactError(f"{url} can't be read: {error}") from error


def _files_of(url: str, most: int) -> tuple[Any, str, list[str]]:
    """Find an adapter's files at a URL: their file system, their folder in it, their names."""
    import fsspec

    files, root = fsspec.core.url_to_fs(url)
    sizes = {name: files.size(f"{root}/{name}") for name in FILES if files.exists(f"{root}/{name}")}
    if CONFIG_FILE not in sizes:
        raise ArtifactError(f"{url} has no {CONFIG_FILE}; give the folder that PEFT saved")
    if sum(size or 0 for size in sizes.values()) > most:
        raise ArtifactError(f"{url} is larger than the {most:,} bytes that this server takes")
    return files, root, [*sizes]

"""Identity of a whole base: a hash of every file that is read when it is loaded.

The fingerprint (`rayft.models.fingerprint`) decides whether an adapter fits a base. It samples weights, and
leaves out heads, the tokenizer and settings. To decide whether a result may be reused takes more, because
one changed number, another chat template or another end-of-sequence token changes the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rayft.models.files import hash_file
from rayft.models.load import ModelConfig, loading, resolve

__all__ = ["SETTINGS", "BaseFiles", "base_files", "read_files", "snapshot"]

READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken", ".spm")
"""Suffixes of the files that transformers reads in a model's folder; pickles are never read."""
SETTINGS = ("config.json", "generation_config.json")
"""Files that also name the version of transformers that wrote them, which is ignored."""
THREADS = 8


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base."""

    identity: str = ""
    """Hash (16 hex digits) of all files; empty if unknown."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File → its hash, or the commit of a hub model, which determines the content of every file."""


def base_files(config: ModelConfig) -> BaseFiles:
    """Hash the files that a base is loaded from, or return the commit of a hub model.

    Each file has a thread, which hashes about 1 GiB/s. Large files are read again only after a change
    (`hash_file`).

    Raises:
        ModelError: if it can't be found or read.
    """
    with loading(config):
        folder = snapshot(config)
        if not Path(resolve(config)).is_dir() and folder.parent.name == "snapshots":
            return _whole({"commit": folder.name})
        paths = read_files(folder)
        with ThreadPoolExecutor(THREADS) as pool:
            hashes = [*pool.map(_hash, paths)]
        return _whole(
            {str(path.relative_to(folder)): value for path, value in zip(paths, hashes, strict=True)}
        )


def snapshot(config: ModelConfig) -> Path:
    """Return the folder that a base is loaded from: its own, or that of its revision in the hub's cache."""
    from transformers.utils.hub import cached_file

    source = resolve(config)
    if Path(source).is_dir():
        return Path(source)
    path = cached_file(source, "config.json", revision=config.revision)
    assert path is not None
    return Path(path).parent


def read_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads in a model's folder, sorted by path."""
    return sorted(
        path
        for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
        if path.suffix in READ and path.is_file() and not path.name.startswith(".")
    )


def _whole(files: Mapping[str, str]) -> BaseFiles:
    text = json.dumps(files, sort_keys=True)
    return BaseFiles(hashlib.sha256(text.encode()).hexdigest()[:16], files)


def _hash(path: Path) -> str:
    if path.name in SETTINGS:
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings.pop("transformers_version", None)
        except (ValueError, AttributeError):
            # Loading it raises the error that says what is wrong.
            return hash_file(path)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return hash_file(path)

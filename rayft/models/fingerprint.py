"""Identity of a base's weights: the same in every dtype, with or without adapters, quantised or not.

The hash covers the names and shapes of parameters, and 64 samples of each, rounded to bfloat16. Output
layers and classification heads are left out, so that tying and new heads make no difference.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayft.models.targets import heads

__all__ = ["absent_files", "fingerprint", "names_in_files", "places", "source_fingerprint"]

HEADS = ("lm_head.", "score.", "classifier.")
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Samples = Callable[[torch.Tensor], torch.Tensor]
"""Returns the numbers at flat positions (int64) of a parameter."""


def fingerprint(model: nn.Module) -> str:
    """Return the hash (16 hex digits) of a base in memory; adapters in it make no difference.

    A quantised model no longer holds the hashed numbers; use `source_fingerprint` for it.
    """
    return _hash(
        (name, tuple(parameter.shape), _memory(parameter)) for name, parameter in _hashed(model).items()
    )


def source_fingerprint(skeleton: nn.Module, source: str, revision: str | None = None) -> str | None:
    """Compute the same hash as `fingerprint`, from the safetensors that a model is loaded from.

    At most 64 rows of each parameter are read. A base that is quantised while it is loaded has the
    fingerprint of the unquantised base, so that an adapter trained on one can be served on either, as QLoRA
    intends.

    Args:
        skeleton: the unquantised model, on the meta device.
        source: its folder or hub id, already downloaded.
        revision: of a hub model.

    Returns:
        None where the files don't hold the parameters under the model's names and shapes.
    """
    from safetensors import safe_open

    files = places(source, revision)
    found = []
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for name, parameter in _hashed(skeleton).items():
            key = next((key for key in names_in_files(skeleton, name) if key in files), None)
            if key is None:
                return None
            file = files[key]
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, framework="pt"))
            shape = tuple(parameter.shape)
            if tuple(opened[file].get_slice(key).get_shape()) != shape:
                return None
            found.append((name, shape, _file(opened[file], key, shape)))
        return _hash(found)


def _hash(parameters: Iterable[tuple[str, tuple[int, ...], Samples]]) -> str:
    digest = hashlib.sha256()
    for name, shape, samples in parameters:
        size = math.prod(shape)
        picks = torch.linspace(0, size - 1, min(64, size), dtype=torch.float64).long()
        sample = samples(picks).to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name}{shape}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def _hashed(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the hash covers, by name."""
    skipped = (*HEADS, *(f"{head}." for head in heads(model)))
    return {
        name: parameter
        for name, parameter in sorted(model.named_parameters())
        if not name.startswith(skipped) and ".adapter." not in name
    }


def _memory(parameter: torch.Tensor) -> Samples:
    flat = parameter.detach().reshape(-1)
    return lambda picks: flat[picks.to(flat.device)]


def _file(opened: Any, key: str, shape: tuple[int, ...]) -> Samples:
    def samples(picks: torch.Tensor) -> torch.Tensor:
        if not shape:
            return opened.get_tensor(key).reshape(1)  # type: ignore[no-any-return]
        rows, width = opened.get_slice(key), math.prod(shape[1:])
        return torch.stack(
            [rows[pick // width : pick // width + 1].reshape(-1)[pick % width] for pick in picks.tolist()]
        )

    return samples


def names_in_files(model: nn.Module, name: str) -> tuple[str, ...]:
    """Return the names that files may have for a parameter: bases saved without a head lack the prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, name.removeprefix(prefix), prefix + name


def places(source: str, revision: str | None, *, local: bool = False) -> dict[str, str]:
    """Return the file of each tensor: key → path; empty if there are no safetensors.

    Args:
        source: a folder or a hub id.
        revision: of a hub model.
        local: whether to use only files on this machine and download nothing.
    """
    from safetensors import safe_open

    single = _file_of(source, revision, WEIGHTS_FILE, local=local)
    if single is not None:
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    files, paths = _indexed(source, revision, local=local)
    return {key: path for key, file in files.items() if (path := paths[file]) is not None}


def absent_files(source: str, revision: str | None = None) -> list[str]:
    """Return the files of weights that a model's index names and that are not on this machine.

    Args:
        source: a folder or a hub id.
        revision: of a hub model.
    """
    if _file_of(source, revision, WEIGHTS_FILE, local=True) is not None:
        return []
    _, paths = _indexed(source, revision, local=True)
    return sorted(file for file, path in paths.items() if path is None)


def _indexed(
    source: str, revision: str | None, *, local: bool
) -> tuple[dict[str, str], dict[str, str | None]]:
    """Return the file of each tensor, as a model's index names it, and the path of each of these files.

    A path is None if there is no such file. Without an index both are empty.
    """
    index = _file_of(source, revision, INDEX_FILE, local=local)
    if index is None:
        return {}, {}
    files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    return files, {file: _file_of(source, revision, file, local=local) for file in set(files.values())}


def _file_of(source: str, revision: str | None, name: str, *, local: bool) -> str | None:
    """Return the path of a model's file, which is downloaded if it may be; None if there is none."""
    from transformers.utils.hub import cached_file

    path: str | None = cached_file(
        source,
        name,
        revision=revision,
        local_files_only=local,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path

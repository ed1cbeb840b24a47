"""The weights of a model on disk, under the model's own names, a block of rows at a time.

A whole model is never in memory, so that two of 8 B parameters can be compared where one does not fit. The
exception are files whose names for tensors differ from the model's (ViT's). Only transformers can map one
to the other, so it loads such files, whole and in float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayft.artifacts import CONFIG_FILE
from rayft.artifacts.read import FLOATS
from rayft.errors import ModelError
from rayft.models.fingerprint import fingerprint, names_in_files, places, source_fingerprint
from rayft.models.load import ModelConfig, loading, resolve
from rayft.models.targets import heads

__all__ = ["Checkpoint", "open_checkpoint"]

BLOCK = 2**24
"""Count of numbers of one tensor that are read at once (64 MiB in float32)."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    where: str
    """The file and the tensor's name in it."""
    kind: str
    """Its type, as safetensors calls it."""
    read: Callable[[int, int], torch.Tensor]
    """Returns the rows from the first argument to before the second."""

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield it in float32, at most `BLOCK` numbers at a time: (number of the first row, rows).

        Raises:
            ModelError: if it holds NaN or Inf, or the numbers are codes (FP8 and such).
        """
        if self.kind not in FLOATS:
            raise ModelError(
                f"{self.where} is of type {self.kind}, whose numbers are no weights by themselves: give a "
                "checkpoint in float32, float16 or bfloat16"
            )
        rows, width = (self.shape or (1,))[0], math.prod(self.shape[1:])
        step = max(1, BLOCK // max(1, width))
        for start in range(0, rows, step):
            block = self.read(start, min(start + step, rows)).float()
            if not torch.isfinite(block).all():
                raise ModelError(
                    f"{self.where} holds NaN or Inf, so nothing can be extracted: copy the checkpoint again, "
                    "or train again with a lower learning rate"
                )
            yield start, block


@dataclass(frozen=True)
class Checkpoint:
    """The tensors in the files of a model."""

    name: str
    """Folder, registered name or hub id."""
    parameters: dict[str, Stored]
    """Parameters of the model, by the model's names; of parameters that share a tensor, the first."""
    others: dict[str, Stored]
    """Tensors for which the model has no parameter, by the files' names."""
    fingerprint: Callable[[], str]
    """Computes the fingerprint that `load_model` returns; empty if only loading can."""

    def parameter(self, name: str) -> Stored:
        """Return a parameter that must be there.

        Raises:
            ModelError: if it is not.
        """
        if name not in self.parameters:
            raise ModelError(
                f"{self.name} has no tensor {name}: is a file of it missing, or is it a model of another "
                "kind? Copy the whole checkpoint, or leave the layer out by targets"
            )
        return self.parameters[name]


@contextmanager
def open_checkpoint(skeleton: nn.Module, config: ModelConfig) -> Iterator[Checkpoint]:
    """Open the files that a model is loaded from, reading only their headers.

    Args:
        skeleton: the model on the meta device, for the names.
        config: names a folder, a registered model, or a hub id that is downloaded already.

    Raises:
        ModelError: if there are none, they are an adapter's, or one is damaged.
    """
    with ExitStack() as stack:
        files = _files(stack, config)
        found: dict[str, Stored] = {}
        used: set[str] = set()
        lacking = False
        outside = tuple(f"{head}." for head in heads(skeleton))
        for name in dict(skeleton.named_parameters()):
            key = next((key for key in _keys(skeleton, name) if key in files), None)
            if key is not None:
                found[name] = files[key]
                used.add(key)
            else:
                lacking |= not name.startswith(outside)
        others = _others(skeleton, files, used)
        if lacking and others:
            yield _loaded(skeleton, config)
        else:
            yield Checkpoint(
                config.name,
                found,
                others,
                lambda: source_fingerprint(skeleton, resolve(config), config.revision) or "",
            )


def _files(stack: ExitStack, config: ModelConfig) -> dict[str, Stored]:
    """Open all files: the files' name of each tensor → the tensor."""
    from safetensors import SafetensorError, safe_open

    if (Path(config.name).expanduser() / CONFIG_FILE).is_file():
        raise ModelError(
            f"{config.name} is an adapter folder ({CONFIG_FILE}), no model: give the folder of the fully "
            "fine-tuned model, or squeeze the adapter itself"
        )
    stored, opened, file = {}, {}, config.name
    try:
        for key, file in places(resolve(config), config.revision).items():
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, framework="pt"))
            stored[key] = _in_file(opened[file], file, key)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} is truncated or damaged ({error}); copy it again") from error
    if not stored:
        raise ModelError(
            f"{config.name} has no weights as safetensors here; download it, or save it again by "
            "transformers' save_pretrained"
        )
    return stored


def _in_file(opened: Any, file: str, key: str) -> Stored:
    rows = opened.get_slice(key)
    shape = tuple(rows.get_shape())

    def read(start: int, stop: int) -> torch.Tensor:
        tensor = rows[start:stop] if shape else opened.get_tensor(key).reshape(1)
        return torch.as_tensor(tensor)

    return Stored(shape, f"{file}: {key}", rows.get_dtype(), read)


def _keys(skeleton: nn.Module, name: str) -> Iterator[str]:
    """Yield the names that files may have for a parameter; one that is tied may have its partner's name."""
    tied = getattr(skeleton, "_tied_weights_keys", None)
    partner = tied.get(name) if isinstance(tied, dict) else None
    for own in (name, partner):
        if own is not None:
            yield from names_in_files(skeleton, own)


def _others(skeleton: nn.Module, files: dict[str, Stored], used: set[str]) -> dict[str, Stored]:
    """Return the other tensors, without buffers of old versions, codes, and second copies of tied tensors."""
    ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {
        key: stored
        for key, stored in files.items()
        if key not in used and stored.kind in FLOATS and not any(re.search(part, key) for part in ignored)
    }


def _loaded(skeleton: nn.Module, config: ModelConfig) -> Checkpoint:
    """Let transformers load the model; parameters that it drew at random are left out."""
    with loading(config), torch.random.fork_rng(devices=[]):
        # Seeded as in `load_model`, so that the fingerprint is the same.
        torch.default_generator.manual_seed(0)
        model, report = type(skeleton).from_pretrained(  # type: ignore[attr-defined]
            resolve(config),
            revision=config.revision,
            config=skeleton.config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    drawn = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    found = {
        name: _in_memory(parameter.detach(), f"{config.name}: {name}")
        for name, parameter in model.named_parameters()
        if name not in drawn
    }
    return Checkpoint(config.name, found, {}, lambda: fingerprint(model))


def _in_memory(tensor: torch.Tensor, where: str) -> Stored:
    flat = tensor if tensor.ndim else tensor.reshape(1)
    return Stored(tuple(tensor.shape), where, "F32", lambda start, stop: flat[start:stop])

"""Merge an adapter into its base, and measure what rounding loses.

    W' = round(W + ΔW)                       W (O × I), ΔW = s·B·A
    lost = ‖ΔW − (W' − W)‖ / ‖ΔW‖            of each module, and of all modules together

The sum is computed in float32 (in float64 for a base in float64) and rounded once, to the type in which the
base stores W. An update that is small beside W loses much of itself in 16 bits: bfloat16 has 8 digits.

The base's files are copied tensor by tensor, so that one file of the result at a time is in memory. Where
their names for tensors differ from the model's, and for classifiers, transformers loads the whole base.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayft.artifacts import AdapterArtifact
from rayft.errors import BaseMismatchError, ModelError
from rayft.methods.base import LoraFactors
from rayft.models.files import save_model
from rayft.models.fingerprint import places
from rayft.models.heads import head_parameters
from rayft.models.identity import SETTINGS, read_files, snapshot
from rayft.models.inject import check_fits
from rayft.models.load import ModelConfig, load_encoder, load_model, loading, resolve, weight_files
from rayft.models.targets import is_transposed

__all__ = ["Rounding", "merge", "merged_bytes"]

BLOCK = 2**24
"""Count of numbers of one weight that are added at once (64 MiB in float32)."""
SHARD = "2GB"
"""Size of the largest file of weights; one file at a time is in memory."""


@dataclass(frozen=True)
class Rounding:
    """How much of an update the rounding of merged weights loses."""

    dtype: str
    """Type of the merged weights, such as `bfloat16`."""
    total: float
    """‖ΔW − (W' − W)‖ / ‖ΔW‖ over all modules together."""
    modules: Mapping[str, float]
    """The same of each module; 0 where ΔW is 0."""

    @property
    def worst(self) -> str:
        """Path of the module that loses most."""
        return max(self.modules, key=lambda name: self.modules[name])


@dataclass
class _Sums:
    """Sums of squares of a module."""

    lost: float = 0.0
    update: float = 0.0

    @property
    def ratio(self) -> float:
        return math.sqrt(self.lost / self.update) if self.update else 0.0


def merge(artifact: AdapterArtifact, base: ModelConfig, skeleton: nn.Module, folder: Path) -> Rounding:
    """Write a model folder with an adapter merged into its base, and return what rounding loses.

    Args:
        artifact: the adapter.
        base: the base, unquantised; of a classifier with the adapter's `num_labels`.
        skeleton: the base on the meta device.
        folder: an empty folder.

    Raises:
        BaseMismatchError: if the adapter is for another base, or two modules share one weight.
        ModelError: if the base can't be read, or a merged weight is not finite.
    """
    _check_shared(artifact, skeleton)
    files = weight_files(base, skeleton)
    if files is None:
        return _merge_in_memory(artifact, base, skeleton, folder)
    check_fits(skeleton, artifact, files.fingerprint)
    keys = {files.places[f"{name}.weight"][1]: name for name in artifact.modules}
    sums, dtypes = _merge_files(artifact, base, skeleton, keys, folder)
    _copy_others(base, folder, left_out=())
    return _rounding(sums, dtypes)


def merged_bytes(base: ModelConfig) -> int:
    """Return the size of a base's weights on disk in bytes; 0 if its files are not here."""
    with loading(base):
        files = set(places(resolve(base), base.revision, local=True).values())
    return sum(Path(file).stat().st_size for file in files)


def _check_shared(artifact: AdapterArtifact, skeleton: nn.Module) -> None:
    """Refuse a weight that two modules share: merging one module's update would change the other."""
    owners: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        adapted = [name for name in names if name.removesuffix(".weight") in artifact.modules]
        if adapted and len(names) > 1:
            raise BaseMismatchError(
                f"{' and '.join(names)} are one weight in the base, so that an update of one of them can't "
                "be merged; use the adapter unmerged"
            )


def _merge_files(
    artifact: AdapterArtifact, base: ModelConfig, skeleton: nn.Module, keys: Mapping[str, str], folder: Path
) -> tuple[dict[str, _Sums], set[torch.dtype]]:
    """Write the files of weights: the base's tensors under the same names, those of `keys` merged.

    Args:
        artifact: the adapter.
        base: the base.
        skeleton: the base on the meta device.
        keys: name of a tensor in the base's files → path of the module whose weight it is.
        folder: for the files.

    Returns:
        The sums of each module, and the types of the merged weights.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import safe_open
    from safetensors.torch import save_file

    sums: dict[str, _Sums] = {}
    with loading(base):
        stored = places(resolve(base), base.revision)
        described = _tensors(stored)
    split = split_torch_state_dict_into_shards(described, max_shard_size=SHARD)
    for name, inside in split.filename_to_tensors.items():
        tensors: dict[str, torch.Tensor] = {}
        for key in inside:
            with loading(base), safe_open(stored[key], framework="pt") as opened:
                tensors[key] = opened.get_tensor(key)
            if key in keys:
                module = keys[key]
                turned = is_transposed(skeleton.get_submodule(module))
                tensors[key], sums[module] = _add(tensors[key], artifact.modules[module], turned, module)
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return sums, {described[key].dtype for key in keys}


def _merge_in_memory(artifact: AdapterArtifact, base: ModelConfig, skeleton: Any, folder: Path) -> Rounding:
    """Load the base whole in float32, merge, and let transformers save it in the type of its files."""
    with loading(base):
        stored = places(resolve(base), base.revision)
        kinds = {tensor.dtype for tensor in _tensors(stored).values()}
    # The type that holds the numbers of all files.
    dtype = functools.reduce(torch.promote_types, kinds & WEIGHTS)
    loaded = load_model(base, torch.promote_types(dtype, torch.float32))
    model: Any = loaded.model
    check_fits(model, artifact, loaded.fingerprint)
    sums: dict[str, _Sums] = {}
    for name, factors in artifact.modules.items():
        layer: Any = model.get_submodule(name)
        merged, sums[name] = _add(layer.weight.data.to(dtype), factors, is_transposed(layer), name)
        layer.weight.data = merged
    heads = head_parameters(model)
    for name, value in artifact.heads.items():
        heads[name].data.copy_(value)
    # As the base's own; loading has changed it for training.
    model.config = skeleton.config
    model.to(dtype)
    model.config.dtype = dtype
    save_model(model, folder, max_shard_size=SHARD)
    _copy_others(base, folder, left_out=SETTINGS)
    return _rounding(sums, {dtype})


def _add(weight: torch.Tensor, factors: LoraFactors, turned: bool, name: str) -> tuple[torch.Tensor, _Sums]:
    """Return round(W + ΔW) as W is stored, and the sums of squares of what rounding lost and of ΔW.

    Args:
        weight: W as stored: O × I, or I × O if `turned`.
        factors: of ΔW.
        turned: whether W is stored as inputs × outputs.
        name: path of the module, for messages.

    Raises:
        ModelError: if W or the sum is not finite in W's type.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    a, b = factors.a.to(exact), factors.b.to(exact) * factors.scale
    left, right = (a.t(), b.t()) if turned else (b, a)
    merged, sums = torch.empty_like(weight), _Sums()
    step = max(1, BLOCK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        old, update = weight[rows].to(exact), left[rows] @ right
        merged[rows] = old + update
        new = merged[rows].double()
        if not torch.isfinite(new).all():
            cause = (
                "in the base" if not torch.isfinite(old).all() else f"once it is rounded to {weight.dtype}"
            )
            raise ModelError(
                f"{name}.weight holds NaN or Inf {cause}, so nothing was written; copy the base again, or "
                "give it in a type of a larger range"
            )
        sums.lost += float((update.double() - (new - old.double())).square().sum())
        sums.update += float(update.double().square().sum())
    return merged, sums


def _rounding(sums: Mapping[str, _Sums], dtypes: Collection[torch.dtype]) -> Rounding:
    whole = _Sums(
        math.fsum(one.lost for one in sums.values()), math.fsum(one.update for one in sums.values())
    )
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return Rounding(names, whole.ratio, {name: one.ratio for name, one in sorted(sums.items())})


def _copy_others(base: ModelConfig, folder: Path, left_out: tuple[str, ...]) -> None:
    """Copy the base's other files as they are: configurations, tokenizer or image processor, templates."""
    from transformers.utils.hub import cached_file

    with loading(base):
        if not Path(resolve(base)).is_dir():
            # These are downloaded if they are not here yet.
            load_encoder(base)
            for name in SETTINGS:
                cached_file(
                    base.name,
                    name,
                    revision=base.revision,
                    _raise_exceptions_for_missing_entries=False,
                    _raise_exceptions_for_connection_errors=False,
                )
        source = snapshot(base)
    for path in read_files(source):
        weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
        if weights or path.name in left_out:
            continue
        place = folder / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)


WEIGHTS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
"""Types whose numbers are weights."""


def _tensors(stored: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the tensors of safetensors files on the meta device: only headers are read.

    Args:
        stored: name of a tensor → its file.
    """
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(stored.values()):
        with safe_open(file, framework="pt") as opened:
            # A tensor is a view of the mapped file, whose numbers are not read here.
            inside = [key for key, place in stored.items() if place == file]
            found |= {key: opened.get_tensor(key).to("meta") for key in inside}
    return found

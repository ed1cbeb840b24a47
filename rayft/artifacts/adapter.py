"""`AdapterArtifact`: an adapter in memory, and the folder that it is written to."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mode
from typing import Any

import torch

from rayft.artifacts.folder import saved_whole, write_weights, write_whole
from rayft.artifacts.lora_settings import LoraSettings, read_settings
from rayft.artifacts.meta import (
    CONFIG_FILE,
    META_FILE,
    PREFIX,
    TASK_TYPES,
    WEIGHTS_FILE,
    ArtifactMeta,
    ModuleShapes,
    stored_revision,
)
from rayft.artifacts.read import FLOATS, assemble, check_selector, check_spectrum, read_meta, read_weights
from rayft.errors import ArtifactError, BaseMismatchError, RayftError, SqueezeError
from rayft.methods.base import LoraFactors

__all__ = ["AdapterArtifact", "check_prefix", "folder_bytes", "holds"]

LARGE = 2**26
"""Bytes from which threads save time; with less, handing tensors over takes longer than their hashes."""
THREADS = 4
"""Number of these threads. A server's event loop shares Python's lock with them: with one for each of many
cores, it waited so long for the lock that answers were late."""


@dataclass(frozen=True, eq=False)
class AdapterArtifact:
    """An adapter: the factors of each module, the trained head if there is one, and its origin.

    Two objects are equal only if they are the same; `content_hash` compares their content.
    """

    modules: Mapping[str, LoraFactors] = field(repr=False)
    """Module path in the base model → factors."""
    heads: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    """Parameters that were trained whole (a classification head): parameter path → value."""
    meta: ArtifactMeta = field(default_factory=ArtifactMeta)
    settings: LoraSettings | None = field(default=None, repr=False)
    """The configuration that it was read with; None if it was not read from a folder."""

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(factors.rank for factors in self.modules.values())

    @property
    def parameters(self) -> int:
        """Count of the numbers in its factors and heads, without the A of selectors."""
        count = sum(head.numel() for head in self.heads.values())
        for factors in self.modules.values():
            count += factors.b.numel() + (0 if factors.columns else factors.a.numel())
        return count

    @property
    def bytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @cached_property
    def content_hash(self) -> str:
        """Identity: a hash (16 hex digits) of the hashes of all factors, scales (as float32) and heads.

        It is computed once; the tensors must not change afterwards.
        """
        modules, heads = sorted(self.modules.items()), sorted(self.heads.items())
        tensors = [part for _, factors in modules for part in (factors.a, factors.b)]
        hashes = iter(_digests([*tensors, *(head for _, head in heads)]))
        digest = hashlib.sha256()
        for name, factors in modules:
            # Files hold α = s·rank, so that an s may be read back one unit in the last place off.
            digest.update(f"{name}\0".encode() + struct.pack("<f", factors.scale))
            digest.update(next(hashes) + next(hashes))
        for name, _ in heads:
            digest.update(name.encode() + next(hashes))
        return digest.hexdigest()[:16]

    @property
    def squeezed(self) -> bool:
        """Whether its columns are sorted by singular value, so that prefixes are adapters."""
        return bool(self.meta.singular_values)

    def at_rank(self, rank: int) -> AdapterArtifact:
        """Return a view of the adapter at a lower rank: the first min(rank, own) columns of each module.

        Raises:
            SqueezeError: if it was never squeezed, or the rank is not positive.
        """
        check_prefix(rank, self.rank, squeezed=self.squeezed)
        # Slices share storage with the parent, so nothing is computed.
        modules = {n: LoraFactors(f.a[:rank], f.b[:, :rank], f.scale) for n, f in self.modules.items()}
        return replace(self, modules=modules)

    def check_base(self, fingerprint: str, shapes: ModuleShapes) -> None:
        """Refuse a base that this adapter was not made for.

        Raises:
            BaseMismatchError: if the fingerprint differs, a module is missing or a shape differs.
        """
        if self.meta.base_fingerprint and fingerprint and self.meta.base_fingerprint != fingerprint:
            raise BaseMismatchError(
                f"the adapter was made for the base {self.meta.base_model or 'unknown'} "
                f"({self.meta.base_fingerprint}), not for this one ({fingerprint}); use it with its "
                "own base or train it again on this one"
            )
        for name, factors in self.modules.items():
            if name not in shapes:
                raise BaseMismatchError(
                    f"the base has no linear layer {name} inside it (its output layer and heads don't "
                    "count), so the adapter is for another model, or trains what can't be used here; use it "
                    "with its own base or train it again on this one"
                )
            made_for = (factors.b.shape[0], factors.a.shape[1])
            if made_for != tuple(shapes[name]):
                raise BaseMismatchError(
                    f"{name} is {shapes[name][0]}x{shapes[name][1]} in the base and "
                    f"{made_for[0]}x{made_for[1]} in the adapter; it is for another model, use it with its "
                    "own base or train it again on this one"
                )
        chosen = self.settings.adapts if self.settings else lambda path: False
        lacking = [path for path in shapes if path not in self.modules and chosen(path)]
        if lacking:
            raise BaseMismatchError(
                f"the adapter has no factors of {lacking[0]}, which its {CONFIG_FILE} chooses in this base "
                "(target_modules): its file lacks tensors, or it is for another model; copy it again, or "
                "use it with its own base"
            )

    def save(self, folder: str | Path) -> Path:
        """Write the folder, whole or not at all; an adapter folder that rayft wrote is replaced.

        Raises:
            ArtifactError: if it has no modules, a factor or head holds NaN or Inf, or is no dense tensor of a
                type that adapters are computed with, factors don't fit together, or `folder` is anything but
                an adapter folder that rayft wrote.
            DiskFullError: if there is no space.
        """
        folder = Path(folder)
        if not self.modules:
            raise ArtifactError("an adapter with no modules can't be saved; was one put into the model?")
        self.check("nothing was written")
        write_whole(folder, self._write, self.bytes)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> AdapterArtifact:
        """Read a folder of a PEFT LoRA into CPU tensors, and check everything that needs no base.

        Raises:
            ArtifactError: naming the folder, the module and what to do. Whatever the files hold, there is no
                other error.
        """
        try:
            return cls._read(Path(folder))
        except RayftError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"{folder} can't be read ({type(error).__name__}: {error}); copy or export the adapter again"
            ) from error

    @classmethod
    def _read(cls, folder: Path) -> AdapterArtifact:
        settings = read_settings(folder)
        tensors = read_weights(folder)
        meta = read_meta(folder, settings.model_dump())
        factors, heads = assemble(folder, settings, tensors, meta)
        artifact = cls(modules=factors, heads=heads, meta=meta, settings=settings)
        artifact._check_finite(f"{folder}: ", "it can't be used")
        for name, module in factors.items():
            check_selector(f"{folder}: {name}", module)
            if artifact.squeezed:
                check_spectrum(f"{folder}: {name}", module, meta.singular_values.get(name))
        return artifact

    @property
    def revision(self) -> str | None:
        """Revision of the base on the hub: that which it was trained on, or PEFT's settings name."""
        own = self.settings
        return stored_revision(self.meta, own and own.base_model_name_or_path, own and own.revision)

    def _write(self, folder: Path) -> None:
        write_weights(folder, self._tensors())
        (folder / CONFIG_FILE).write_text(json.dumps(self._peft_config(), indent=2) + "\n", encoding="utf-8")
        columns = {name: factors.columns for name, factors in self.modules.items() if factors.columns}
        meta = self.meta.model_copy(update={"columns": columns})
        (folder / META_FILE).write_text(meta.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def check(self, consequence: str) -> None:
        """Refuse tensors that make no adapter, as `load` refuses them in a file.

        Args:
            consequence: what NaN or Inf lead to, for the message.

        Raises:
            ArtifactError: naming the module or tensor.
        """
        for name, tensor in self._tensors().items():
            if tensor.dtype not in FLOATS.values() or tensor.layout != torch.strided or tensor.is_meta:
                raise ArtifactError(
                    f"{name.removeprefix(PREFIX)} is a {tensor.layout} of {tensor.dtype} on {tensor.device}; "
                    "adapters are computed with dense tensors of float64, float32, float16 or bfloat16 that "
                    "have values: convert it"
                )
        for name, factors in self.modules.items():
            a, b = tuple(factors.a.shape), tuple(factors.b.shape)
            if not (len(a) == len(b) == 2 and a[0] == b[1] and all((*a, *b))):
                raise ArtifactError(
                    f"{name} has A {a} and B {b}; A has to be (R, inputs) and B (outputs, R), with R of 1 or "
                    "more"
                )
            if not math.isfinite(factors.scale):
                raise ArtifactError(f"{name} has the scale {factors.scale}; write a finite one")
        self._check_finite("", consequence)

    def _check_finite(self, where: str, consequence: str) -> None:
        for name, tensor in self._tensors().items():
            if not _is_finite(tensor):
                raise ArtifactError(
                    f"{where}{name.removeprefix(PREFIX)} holds NaN or Inf, so {consequence}; "
                    "train again with a lower learning rate"
                )

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, factors in self.modules.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.a.detach()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.b.detach()
        for name, head in self.heads.items():
            tensors[PREFIX + name] = head.detach()
        return tensors

    def _peft_config(self) -> dict[str, Any]:
        ranks = {name: factors.rank for name, factors in self.modules.items()}
        alphas = {name: _alpha(factors.scale, factors.rank) for name, factors in self.modules.items()}
        rank, alpha = mode(ranks.values()), mode(alphas.values())
        # PEFT also matches a pattern at the end of a path; with `^` it matches this path only.
        exactly = {name: "^" + re.escape(name) for name in self.modules}
        return {
            "peft_type": "LORA",
            "task_type": TASK_TYPES[self.meta.task],
            "base_model_name_or_path": self.meta.base_model,
            **({"revision": self.revision} if self.revision else {}),
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": False,
            "use_dora": False,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": self.meta.transposed,
            "inference_mode": True,
            "init_lora_weights": True,
            "target_modules": sorted(self.modules),
            "modules_to_save": saved_whole(self.modules, self.heads) or None,
            "rank_pattern": {exactly[name]: r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {exactly[name]: a for name, a in alphas.items() if a != alpha},
        }


def holds(folder: Path, content: str) -> bool:
    """Return whether a folder contains an adapter with this content hash."""
    try:
        return AdapterArtifact.load(folder).content_hash == content
    except ArtifactError:
        return False


def folder_bytes(folder: str | Path) -> int:
    """Return the size of an adapter's weights on disk in bytes."""
    return (Path(folder) / WEIGHTS_FILE).stat().st_size


def check_prefix(rank: int, most: int, *, squeezed: bool) -> None:
    """Refuse a rank that is no prefix of an adapter of rank `most`.

    Raises:
        SqueezeError: if the adapter was never squeezed, or the rank is not positive.
    """
    if rank < 1:
        raise SqueezeError(f"rank {rank} is not positive; ask for 1 to {most}")
    if not squeezed:
        raise SqueezeError(
            "this adapter was never squeezed, so its columns are not sorted and a prefix means "
            "nothing; run `rayft squeeze` on it first"
        )


def _digests(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """Return the hash of each tensor."""
    if sum(tensor.nbytes for tensor in tensors) < LARGE:
        return [*map(_digest, tensors)]
    # An adapter of an 8 B model has 700 MB, so threads hash it in parallel (hashlib releases the GIL).
    with ThreadPoolExecutor(THREADS) as threads:
        return [*threads.map(_digest, tensors)]


def _digest(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(flat.numpy().data)
    return digest.digest()


def _is_finite(tensor: torch.Tensor) -> bool:
    # The extremes are NaN if a number is. `isfinite` takes several times as long.
    return not tensor.numel() or all(math.isfinite(one.item()) for one in tensor.aminmax())


def _alpha(scale: float, rank: int) -> float:
    """Return α with α / rank = scale, to the last bit if there is such an α."""
    scale = float(scale)  # of NumPy, which JSON does not know
    alpha = scale * rank
    nearby = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in nearby if a / rank == scale), alpha)

"""The one adapter type on disk: a folder that PEFT loads as it is, plus `rayft.json`.

    adapter_config.json          PEFT's LoraConfig; always `use_rslora: false` and α' = s·rank, with
                                 `rank_pattern` and `alpha_pattern` where modules differ
    adapter_model.safetensors    the factors, and a classification head if one was trained
    rayft.json                   method, selector columns, singular values, base fingerprint, data
                                 digest, parent hash, metrics (`ArtifactMeta`)

A folder without `rayft.json` (anybody's PEFT LoRA) loads too; what it can't tell stays empty.
Safetensors only, never pickle. Folders appear whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mode
from typing import Any, Literal

import torch
from pydantic import ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rayft.config import Section
from rayft.errors import ArtifactError, BaseMismatchError, ResourceError, SqueezeError
from rayft.methods.base import LoraFactors

__all__ = ["AdapterArtifact", "ArtifactMeta", "ModuleShapes", "folder_bytes"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
META_FILE = "rayft.json"
PREFIX = "base_model.model."

NOT_PLAIN = ("alora_invocation_tokens", "arrow_config", "layer_replication", "target_parameters",
             "trainable_token_indices", "use_bdlora", "use_qalora")  # fmt: skip
"""Keys of PEFT's LoraConfig under which the update is more than B·A on linear layers."""
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base alone; PiSSA, OLoRA and others change it."""

ModuleShapes = Mapping[str, tuple[int, int]]
"""Linear layers of a base model: module path → (outputs, inputs)."""


class ArtifactMeta(Section):
    """What `rayft.json` holds."""

    # A score may be NaN; JSON has no word for it, and null would not load again.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    format: Literal[1] = 1
    """Version of this file's format."""
    method: str = "lora"
    """The method that trained it."""
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """What the model does."""
    base_model: str = ""
    """Hub id, folder or registered name of the base."""
    base_fingerprint: str = ""
    """Fingerprint of the base's weights; empty if unknown."""
    data_digest: str = ""
    """Digest of the data it was trained on; empty if unknown."""
    parent: str = ""
    """Content hash of the adapter that this one was squeezed from; empty if none."""
    columns: dict[str, tuple[int, ...]] = {}
    """Inputs that a selector method reads: module → columns."""
    singular_values: dict[str, tuple[float, ...]] = {}
    """Singular values of ΔW at full rank, largest first: module → values; filled by a squeeze."""
    metrics: dict[str, float] = {}
    """Scores and sizes measured when it was made."""


@dataclass(frozen=True)
class AdapterArtifact:
    """An adapter: for each module its factors, the trained head if any, and where it comes from."""

    modules: Mapping[str, LoraFactors]
    """Module path in the base model → factors."""
    heads: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Parameters that were trained whole (a classification head): parameter path → value."""
    meta: ArtifactMeta = field(default_factory=ArtifactMeta)

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(factors.rank for factors in self.modules.values())

    @property
    def parameters(self) -> int:
        """Numbers in its factors and heads; a selector's A counts as its columns only."""
        count = sum(head.numel() for head in self.heads.values())
        for factors in self.modules.values():
            count += factors.b.numel() + (0 if factors.columns else factors.a.numel())
        return count

    @property
    def content_hash(self) -> str:
        """Identity: a hash (16 hex digits) of every factor, scale (as float32) and head."""
        digest = hashlib.sha256()
        for name, factors in sorted(self.modules.items()):
            # PEFT's files hold α = s·rank, from which some s come back one unit in the last place off.
            digest.update(f"{name}\0".encode() + struct.pack("<f", factors.scale))
            digest.update(_bytes(factors.a) + _bytes(factors.b))
        for name, head in sorted(self.heads.items()):
            digest.update(name.encode() + _bytes(head))
        return digest.hexdigest()[:16]

    @property
    def squeezed(self) -> bool:
        """Whether its columns are sorted by singular value, so that prefixes are adapters."""
        return bool(self.meta.singular_values)

    def at_rank(self, rank: int) -> AdapterArtifact:
        """View the adapter at a lower rank: the first min(rank, own) columns of each module.

        Raises:
            SqueezeError: if it was never squeezed, or the rank is not positive.
        """
        if rank < 1:
            raise SqueezeError(f"rank {rank} is not positive; ask for 1 to {self.rank}")
        if not self.squeezed:
            raise SqueezeError(
                "this adapter was never squeezed, so its columns are not sorted and a prefix means "
                "nothing; run `rayft squeeze` on it first"
            )
        # Slices share storage with the parent: nothing is computed here.
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
                raise BaseMismatchError(f"the base has no linear layer {name}; it is for another model")
            made_for = (factors.b.shape[0], factors.a.shape[1])
            if made_for != tuple(shapes[name]):
                raise BaseMismatchError(
                    f"{name} is {shapes[name][0]}x{shapes[name][1]} in the base and "
                    f"{made_for[0]}x{made_for[1]} in the adapter; it is for another model"
                )

    def save(self, folder: str | Path) -> Path:
        """Write the folder, whole or not at all; an existing one is replaced.

        Raises:
            ArtifactError: if it has no modules, or a factor or head holds NaN or Inf.
            ResourceError: if the disk is full.
        """
        folder = Path(folder)
        if not self.modules:
            raise ArtifactError("an adapter with no modules can't be saved; was one put into the model?")
        self._check_finite("", "nothing was written")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            self._write(staging / "new")
            _swap(staging / "new", folder, staging / "old")
        except (OSError, SafetensorError) as error:
            # safetensors writes in Rust and hands the system's error on as text.
            if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
                raise ResourceError(f"no space left for {folder}; free some and try again") from error
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> AdapterArtifact:
        """Read a PEFT LoRA folder (CPU tensors), checking all that can be checked without its base.

        Raises:
            ArtifactError: naming the folder, the module and what to do.
        """
        folder = Path(folder)
        config = _read_config(folder)
        tensors = _read_weights(folder)
        meta = _read_meta(folder, config)
        factors, heads = _assemble(folder, config, tensors, meta)
        artifact = cls(modules=factors, heads=heads, meta=meta)
        artifact._check_finite(f"{folder}: ", "it can't be used")
        for name, module in factors.items():
            _check_selector(f"{folder}: {name}", module)
        return artifact

    def _write(self, folder: Path) -> None:
        folder.mkdir(mode=0o755)
        save_file(self._tensors(), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(self._peft_config(), indent=2) + "\n")
        columns = {name: factors.columns for name, factors in self.modules.items() if factors.columns}
        meta = self.meta.model_copy(update={"columns": columns})
        (folder / META_FILE).write_text(meta.model_dump_json(indent=2) + "\n")

    def _check_finite(self, where: str, consequence: str) -> None:
        for name, tensor in self._tensors().items():
            if not torch.isfinite(tensor).all():
                raise ArtifactError(
                    f"{where}{name.removeprefix(PREFIX)} holds NaN or Inf, so {consequence}; "
                    "train again with a lower learning rate"
                )

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, factors in self.modules.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.a.detach().cpu().contiguous()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.b.detach().cpu().contiguous()
        for name, head in self.heads.items():
            tensors[PREFIX + name] = head.detach().cpu().contiguous()
        return tensors

    def _peft_config(self) -> dict[str, Any]:
        ranks = {name: factors.rank for name, factors in self.modules.items()}
        alphas = {name: _alpha(factors.scale, factors.rank) for name, factors in self.modules.items()}
        rank, alpha = mode(ranks.values()), mode(alphas.values())
        # PEFT matches patterns to the ends of paths too: `^` leaves the one path.
        exactly = {name: "^" + re.escape(name) for name in self.modules}
        return {
            "peft_type": "LORA",
            "task_type": "SEQ_CLS" if self.meta.task == "sequence_classification" else "CAUSAL_LM",
            "base_model_name_or_path": self.meta.base_model,
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": False,
            "use_dora": False,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "target_modules": sorted(self.modules),
            "modules_to_save": sorted({name.rsplit(".", 1)[0] for name in self.heads}) or None,
            "rank_pattern": {exactly[name]: r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {exactly[name]: a for name, a in alphas.items() if a != alpha},
        }


def folder_bytes(folder: str | Path) -> int:
    """Give the size of an adapter's weights on disk."""
    return (Path(folder) / WEIGHTS_FILE).stat().st_size


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Put `new` in the place of `folder`, which comes back if that fails."""
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    finally:
        if not folder.exists() and old.exists():
            old.rename(folder)


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()


def _alpha(scale: float, rank: int) -> float:
    """Find the α whose quotient by the rank is the scale, to the last bit where there is one."""
    alpha = scale * rank
    nearby = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in nearby if a / rank == scale), alpha)


def _check_selector(where: str, factors: LoraFactors) -> None:
    """Refuse columns that A does not select: serving gathers by the one and PEFT multiplies by the other."""
    columns = factors.columns
    if columns is None:
        return
    rank, inputs = factors.a.shape
    if len(columns) == rank and all(0 <= column < inputs for column in columns):
        selector = torch.zeros_like(factors.a)
        selector[torch.arange(rank), list(columns)] = 1
        if torch.equal(selector, factors.a):
            return
    raise ArtifactError(
        f"{where}: the columns in {META_FILE} are not those that lora_A selects; export the adapter again"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {CONFIG_FILE}; give the folder that PEFT saved")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}); export the adapter again") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} holds no mapping; export the adapter again")
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise ArtifactError(f"{folder} holds a '{kind}' adapter; only LoRA loads, convert it first")
    if config.get("use_dora"):
        raise ArtifactError(
            f"{folder} is a DoRA adapter: its update has full rank, and dropping the magnitude would "
            "change the model; train it without use_dora"
        )
    if config.get("bias", "none") != "none":
        raise ArtifactError(f"{folder} trains biases, which no LoRA factor holds; train it with bias='none'")
    for key in filter(config.get, NOT_PLAIN):
        raise ArtifactError(f"{folder} sets {key}, so it is no plain LoRA; train it without {key}")
    init = config.get("init_lora_weights", True)
    if init not in KEEPS_BASE:
        raise ArtifactError(
            f"{folder} was initialised by '{init}', which changes the base: save it with "
            "`path_initial_model_for_weight_conversion`, so that PEFT converts it to plain LoRA"
        )
    return config


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which is never read: save it as safetensors)"
        extra = pickled if (folder / "adapter_model.bin").exists() else ""
        raise ArtifactError(f"{folder} has no {WEIGHTS_FILE}{extra}; export the adapter again")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is truncated or damaged ({error}); copy or export it again") from error


def _read_meta(folder: Path, config: Mapping[str, Any]) -> ArtifactMeta:
    path = folder / META_FILE
    if not path.is_file():
        task = "sequence_classification" if config.get("task_type") == "SEQ_CLS" else "causal_lm"
        base = config.get("base_model_name_or_path") or ""
        return ArtifactMeta.model_validate({"task": task, "base_model": base})
    try:
        return ArtifactMeta.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ArtifactError(f"{path} does not fit its format ({error}); export the adapter again") from error


def _assemble(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], meta: ArtifactMeta
) -> tuple[dict[str, LoraFactors], dict[str, torch.Tensor]]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    heads: dict[str, torch.Tensor] = {}
    saved = tuple(config.get("modules_to_save") or ())
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = tensor
        elif any(part in saved for part in (name.rsplit(".", 1)[0], *name.split("."))):
            heads[name] = tensor
        else:
            raise ArtifactError(f"{folder}: {key} is no LoRA factor; export the adapter as plain LoRA")
    if not pairs:
        raise ArtifactError(f"{folder} holds no LoRA factors; export the adapter again")
    factors = {name: _factors(folder, config, name, pair, meta) for name, pair in sorted(pairs.items())}
    return factors, heads


def _factors(
    folder: Path, config: Mapping[str, Any], name: str, pair: Mapping[str, torch.Tensor], meta: ArtifactMeta
) -> LoraFactors:
    if set(pair) != {"A", "B"}:
        missing = "B" if "A" in pair else "A"
        raise ArtifactError(f"{folder}: {name} has no lora_{missing}; export the adapter again")
    a, b = pair["A"], pair["B"]
    rank = _by_pattern(config.get("rank_pattern"), name, config.get("r"))
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
        raise ArtifactError(
            f"{folder}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, but {CONFIG_FILE} says rank "
            f"{rank}; config and weights are not of the same adapter"
        )
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraFactors(a, b, float(scale), columns=meta.columns.get(name))


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Look a module up as PEFT does: the first pattern that matches the end of its path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default

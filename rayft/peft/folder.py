"""Adapters of PEFT without LoRA factors, in PEFT's own format: `PeftModel.from_pretrained` loads the folder.

    adapter_config.json          PEFT's configuration
    adapter_model.safetensors    PEFT's tensors, and a classification head if one was trained
    rayft.json                   `ArtifactMeta`, as beside every adapter

Such an adapter can be scored and compared. It has no factors, so it can't be squeezed, promoted or served.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rayft.artifacts import (
    CONFIG_FILE,
    META_FILE,
    AdapterArtifact,
    ArtifactMeta,
    ModuleShapes,
    saved_whole,
    write_whole,
)
from rayft.artifacts import PREFIX as BASE
from rayft.artifacts.folder import write_weights
from rayft.artifacts.lora_settings import read_json
from rayft.artifacts.meta import TASK_TYPES, stored_revision
from rayft.artifacts.read import FLOATS, INDICES, read_meta, read_weights
from rayft.errors import ArtifactError, BaseMismatchError

__all__ = ["Artifact", "PeftFolder", "load_adapter"]


@dataclass(frozen=True, eq=False)
class PeftFolder:
    """An adapter in PEFT's own format."""

    config: Mapping[str, Any]
    """The content of `adapter_config.json`."""
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    """The content of `adapter_model.safetensors`: name → value."""
    meta: ArtifactMeta

    @classmethod
    def made(
        cls,
        settings: Any,
        tensors: Mapping[str, torch.Tensor],
        heads: Mapping[str, torch.Tensor],
        meta: ArtifactMeta,
    ) -> PeftFolder:
        """Combine PEFT's configuration and tensors with the heads that trained beside them.

        Args:
            settings: PEFT's configuration object.
            tensors: PEFT's name → value.
            heads: parameter path in the base → value.
            meta: the content of `rayft.json`.
        """
        config = {**settings.to_dict(), "inference_mode": True, "base_model_name_or_path": meta.base_model}
        config["task_type"] = TASK_TYPES[meta.task]
        if meta.base_revision:
            config["revision"] = meta.base_revision
        adapted = (name.removeprefix(BASE) for name in tensors)
        config["modules_to_save"] = saved_whole(adapted, heads) or None
        config.pop("runtime_config", None)
        whole = {**tensors, **{BASE + name: value for name, value in heads.items()}}
        return cls(json.loads(json.dumps(config, default=_plain)), whole, meta)

    @property
    def revision(self) -> str | None:
        """Revision of the base on the hub: that which it was trained on, or PEFT's settings name."""
        named = self.config.get("base_model_name_or_path")
        return stored_revision(self.meta, named, self.config.get("revision"))

    @property
    def parameters(self) -> int:
        """Count of the numbers stored, including frozen ones that PEFT saves."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def heads(self) -> dict[str, torch.Tensor]:
        """Parameters that were trained whole: path in the base → value."""
        whole = tuple(f"{BASE}{name}." for name in self.config.get("modules_to_save") or ())
        return {n.removeprefix(BASE): value for n, value in self.tensors.items() if n.startswith(whole)}

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        """PEFT's tensors, without the heads: PEFT's name → value."""
        heads = self.heads
        return {name: v for name, v in self.tensors.items() if name.removeprefix(BASE) not in heads}

    @property
    def content_hash(self) -> str:
        """Identity: a hash (16 hex digits) of the configuration and every tensor."""
        same = {key: value for key, value in self.config.items() if key != "base_model_name_or_path"}
        digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def peft_config(self) -> Any:
        """Build PEFT's configuration object, without the heads, which stay the model's own."""
        from peft import get_peft_config

        return get_peft_config({**self.config, "modules_to_save": None})

    def check_base(self, fingerprint: str, shapes: ModuleShapes) -> None:
        """Refuse a base that lacks a layer which the adapter adapts; PEFT checks sizes when it attaches.

        Args:
            fingerprint: of the base; not compared.
            shapes: linear layers of the base: module path → (outputs, inputs).

        Raises:
            BaseMismatchError: naming the tensor that the base has no layer for.
        """
        for key in self.adapter:
            name = key.removeprefix(BASE)
            if key.startswith(BASE) and not any(path in shapes for path in _modules_above(name)):
                raise BaseMismatchError(
                    f"the base has no linear layer for {name}; the adapter is for another model, use it with "
                    "its own base or train it again on this one"
                )

    def save(self, folder: str | Path) -> Path:
        """Write the folder, whole or not at all; an adapter folder that rayft wrote is replaced.

        Raises:
            ArtifactError: if a tensor holds NaN or Inf, or the place holds anything but such a folder.
            DiskFullError: if there is no space.
        """
        folder = Path(folder)
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ArtifactError(
                    f"{name} holds NaN or Inf, so nothing was written; train again with a lower learning rate"
                )
        write_whole(folder, self._write, sum(tensor.nbytes for tensor in self.tensors.values()))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> PeftFolder:
        """Read a folder that `save` wrote.

        Raises:
            ArtifactError: if a file is missing or damaged.
        """
        folder = Path(folder)
        config = read_json(folder)
        return cls(config, read_weights(folder, FLOATS | INDICES), read_meta(folder, config))

    def _write(self, folder: Path) -> None:
        write_weights(folder, self.tensors)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        (folder / META_FILE).write_text(self.meta.model_dump_json(indent=2) + "\n", encoding="utf-8")


Artifact = AdapterArtifact | PeftFolder
"""A trained adapter: as LoRA factors, or in PEFT's own format."""


def load_adapter(folder: str | Path) -> Artifact:
    """Read an adapter folder of a trial: as LoRA factors, or in PEFT's own format.

    Raises:
        ArtifactError: if a file is missing or damaged, naming the folder and what to do.
    """
    path = Path(folder)
    own = read_json(path)
    plain = own["peft_type"] == "LORA" and not own.get("use_dora")
    return AdapterArtifact.load(path) if plain or not (path / META_FILE).is_file() else PeftFolder.load(path)


def _modules_above(parameter: str) -> list[str]:
    """Return the paths of the modules that a parameter is in, innermost first."""
    parts = parameter.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _plain(value: Any) -> Any:
    """Return PEFT's sets and enumerations as values that JSON has."""
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))

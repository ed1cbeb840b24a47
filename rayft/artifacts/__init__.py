"""The one adapter type on disk: a folder that PEFT loads as it is, plus `rayft.json`.

    adapter_config.json          PEFT's LoraConfig; always `use_rslora: false` and α' = s·rank, with
                                 `rank_pattern` and `alpha_pattern` where modules differ
    adapter_model.safetensors    the factors, and a classification head if one was trained
    rayft.json                   method, selector columns, singular values, base fingerprint, data
                                 digest, parent hash, metrics (`ArtifactMeta`)

A folder without `rayft.json`, as PEFT itself saves a LoRA, loads too; what only `rayft.json` holds is then
empty. Weights are safetensors, never pickle. A folder is written whole or not at all, and only a folder that
rayft wrote is replaced.
"""

from __future__ import annotations

from rayft.artifacts.adapter import AdapterArtifact, check_prefix, folder_bytes, holds
from rayft.artifacts.folder import check_replaceable, contains, saved_whole, settle, write_whole
from rayft.artifacts.meta import CONFIG_FILE, META_FILE, PREFIX, WEIGHTS_FILE, ArtifactMeta, ModuleShapes

__all__ = [
    "CONFIG_FILE",
    "META_FILE",
    "PREFIX",
    "WEIGHTS_FILE",
    "AdapterArtifact",
    "ArtifactMeta",
    "ModuleShapes",
    "check_prefix",
    "check_replaceable",
    "contains",
    "folder_bytes",
    "holds",
    "saved_whole",
    "settle",
    "write_whole",
]

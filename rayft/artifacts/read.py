"""Reading a PEFT LoRA folder, with every check that needs no base."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from rayft.artifacts.meta import CONFIG_FILE, META_FILE, PREFIX, WEIGHTS_FILE, ArtifactMeta
from rayft.errors import ArtifactError
from rayft.methods.base import LoraFactors
from rayft.methods.rival import NOT_PLAIN

__all__ = ["assemble", "check_selector", "read_config", "read_meta", "read_weights"]

NO_FACTORS = "and this can't be squeezed, promoted or served: train lora (or peft:PiSSA, peft:MiSS) instead"
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base alone; PiSSA, OLoRA and others change it."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read PEFT's configuration and refuse what is no plain LoRA."""
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
        raise ArtifactError(f"{folder} holds a '{kind}' adapter; only LoRA loads, {NO_FACTORS}")
    if config.get("use_dora"):
        raise ArtifactError(
            f"{folder} is a DoRA adapter: its update has full rank, and dropping the magnitude would "
            f"change the model; {NO_FACTORS}"
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


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors, by PEFT's names."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which is never read: save it as safetensors)"
        extra = pickled if (folder / "adapter_model.bin").exists() else ""
        raise ArtifactError(f"{folder} has no {WEIGHTS_FILE}{extra}; export the adapter again")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is truncated or damaged ({error}); copy or export it again") from error


def read_meta(folder: Path, config: Mapping[str, Any]) -> ArtifactMeta:
    """Read `rayft.json`, or make of PEFT's configuration what it can tell."""
    path = folder / META_FILE
    if not path.is_file():
        task = "sequence_classification" if config.get("task_type") == "SEQ_CLS" else "causal_lm"
        base = config.get("base_model_name_or_path") or ""
        transposed = bool(config.get("fan_in_fan_out"))
        return ArtifactMeta.model_validate({"task": task, "base_model": base, "transposed": transposed})
    try:
        return ArtifactMeta.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ArtifactError(f"{path} does not fit its format ({error}); export the adapter again") from error


def assemble(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], meta: ArtifactMeta
) -> tuple[dict[str, LoraFactors], dict[str, torch.Tensor]]:
    """Sort the tensors into factors by module path, and heads by parameter path."""
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


def check_selector(where: str, factors: LoraFactors) -> None:
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

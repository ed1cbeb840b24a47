"""An adapter folder that PEFT and plain vLLM load: short target names, one rank, one scale.

vLLM 0.26 reads `r` and `lora_alpha` of `adapter_config.json` and no patterns, so that modules whose
rank or α differ would be computed with the wrong scale. Here all modules have one rank and one scale s:

    ΔW_i = s_i·B_i·A_i = s·[B_i·(s_i / s)  0]·[A_i; 0]        A_i padded with rows of zeros, B_i with columns

The update stays what it was, except for one rounding of B_i where s_i / s is no power of two.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from statistics import mode

import torch
from torch.nn.functional import pad

from rayft.artifacts import CONFIG_FILE, AdapterArtifact, ArtifactMeta
from rayft.artifacts.lora_settings import LoraSettings, read_json
from rayft.methods.base import LoraFactors

__all__ = ["VLLM_RANKS", "served_rank", "target_names", "uniform", "write_folder"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `max_lora_rank`."""


def uniform(artifact: AdapterArtifact) -> AdapterArtifact:
    """Return the same adapter with one rank and one scale in all modules."""
    scales = [factors.scale for factors in artifact.modules.values() if factors.scale]
    rank, scale = artifact.rank, mode(scales or [1.0])
    modules = {name: _like(factors, rank, scale) for name, factors in artifact.modules.items()}
    return replace(artifact, modules=modules, meta=_meta(artifact, rank))


def target_names(paths: Collection[str], every: Collection[str], heads: Collection[str]) -> list[str] | str:
    """Return the shortest `target_modules` with which PEFT adapts the given modules and no others.

    These are last parts of names (`q_proj`), longer ends of paths (`attn.c_proj`), whole paths, or, where
    whole paths are ends of other paths, a regular expression.

    Args:
        paths: of the adapted modules.
        every: paths of all modules of the base.
        heads: names of the modules that are trained whole.
    """
    for depth in range(1, max(path.count(".") for path in paths) + 1):
        names = sorted({".".join(path.split(".")[-depth:]) for path in paths})
        numbered = any(part.isdigit() for name in names for part in name.split("."))
        if not numbered and _adapted(names, every, heads) == {*paths}:
            return names
    if _adapted(sorted(paths), every, heads) == {*paths}:
        return sorted(paths)
    return "|".join(re.escape(path) for path in sorted(paths))


def write_folder(artifact: AdapterArtifact, targets: list[str] | str, folder: Path) -> None:
    """Write an adapter's files into an empty folder, with other `target_modules`.

    Args:
        artifact: the adapter, whose modules have one rank and one scale.
        targets: as `target_names` returns them.
        folder: the folder.
    """
    artifact.save(folder)
    config = read_json(folder)
    config["target_modules"] = targets
    if float(config["lora_alpha"]).is_integer():
        config["lora_alpha"] = int(config["lora_alpha"])
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def served_rank(rank: int) -> int | None:
    """Return the `max_lora_rank` with which vLLM serves a rank; None if it serves none so high."""
    return next((most for most in VLLM_RANKS if rank <= most), None)


def _like(factors: LoraFactors, rank: int, scale: float) -> LoraFactors:
    """Return factors of the same update with another rank, not below their own, and another scale."""
    a, b = factors.a, factors.b
    if factors.scale != scale:
        ratio = factors.scale / scale
        # A power of two changes no digit; any other factor would cost a factor of 16 bits some.
        exact = abs(math.frexp(ratio)[0]) == 0.5
        b = (b if exact else b.to(torch.promote_types(b.dtype, torch.float32))) * ratio
    missing = rank - factors.rank
    if not missing:
        return LoraFactors(a, b, scale, factors.columns)
    # The rows of zeros select no input.
    return LoraFactors(pad(a, (0, 0, 0, missing)), pad(b, (0, missing)), scale)


def _meta(artifact: AdapterArtifact, rank: int) -> ArtifactMeta:
    """Return the metadata of the same adapter with all modules at one rank.

    A column of zeros has the singular value 0, and not that of the column which a squeeze cut off there: the
    energy of what was cut off stays lost.
    """
    spectra, tails = dict(artifact.meta.singular_values), dict(artifact.meta.tail_energy)
    for name, values in artifact.meta.singular_values.items():
        own = artifact.modules[name].rank
        if own < rank:
            spectra[name] = values[:own] + (0.0,) * (rank - own)
            tails[name] = tails.get(name, 0.0) + sum(value * value for value in values[own:])
    return artifact.meta.model_copy(update={"singular_values": spectra, "tail_energy": tails})


def _adapted(targets: list[str], every: Collection[str], heads: Collection[str]) -> set[str]:
    settings = LoraSettings(peft_type="LORA", target_modules=targets, modules_to_save=[*heads] or None)
    return {path for path in every if settings.adapts(path)}

"""A rank for each module from one budget of bytes: the ranks go where they keep most of the update per byte.

Given the singular values σ of each module's ΔW and the bytes c that one rank of it takes, choose ranks k,
1 ≤ k ≤ R, that lose least within the budget:

    minimise Σ_modules Σ_{i > k} σᵢ²        subject to Σ_modules k·c ≤ budget

Values fall within a module, so taking values in the order of σ²/c takes those of each module from the largest
on. This is the optimum if it uses up the budget, and otherwise differs from it by at most the one value that
did not fit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

import torch

from rayft.artifacts import PREFIX, AdapterArtifact
from rayft.errors import SqueezeError

__all__ = ["parse_bytes", "ranks_for_budget", "weight_bytes"]

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def parse_bytes(text: str) -> int:
    """Parse a size such as `1.5MB`, `800 kB` or `2MiB` (a plain number is bytes).

    Raises:
        SqueezeError: if the text is no size.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kKmMgG]i?)?[bB]?\s*", text)
    if found is None or float(found[1]) == 0:
        raise SqueezeError(f"'{text}' is no size; write it as 1.5MB, 800kB or 2MiB")
    return int(float(found[1]) * UNITS[(found[2] or "").lower()])


def ranks_for_budget(
    spectra: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Choose each module's rank so that the least possible part of Σσ² is lost within a budget.

    Args:
        spectra: module → singular values of its ΔW, largest first.
        costs: module → bytes of one rank.
        budget: bytes for all modules together.

    Raises:
        SqueezeError: if not even rank 1 everywhere fits.
    """
    ranks = dict.fromkeys(spectra, 1)
    left = budget - sum(costs[name] for name in spectra)
    if left < 0:
        raise SqueezeError(
            f"the budget leaves {budget:,} bytes for the factors, and rank 1 in all {len(spectra)} modules "
            f"takes {budget - left:,}: raise it by {-left:,} bytes or more, or train fewer modules"
        )
    # Values that are rounding error are not worth a byte.
    wanted = [
        (-value * value / costs[name], name)
        for name, values in spectra.items()
        for value in values[1:]
        if value > values[0] * torch.finfo(torch.float32).eps
    ]
    full: set[str] = set()
    for _, name in sorted(wanted):
        if name in full:
            continue
        if costs[name] > left:
            # The next values of this module cost as much and are worth less; a cheaper module may still fit.
            full.add(name)
            continue
        ranks[name] += 1
        left -= costs[name]
    return ranks


def weight_bytes(artifact: AdapterArtifact) -> int:
    """Return the size of `adapter_model.safetensors` as `artifact.save` would write it."""
    tensors = {f"{PREFIX}{name}": head for name, head in artifact.heads.items()}
    for name, factors in artifact.modules.items():
        tensors |= {
            f"{PREFIX}{name}.lora_A.weight": factors.a,
            f"{PREFIX}{name}.lora_B.weight": factors.b,
        }
    # The format's order: wide numbers first, then by name (https://github.com/huggingface/safetensors).
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        end = offset + tensors[name].numel() * tensors[name].element_size()
        kind = DTYPES.get(tensors[name].dtype, "F32")
        header[name] = {"dtype": kind, "shape": [*tensors[name].shape], "data_offsets": [offset, end]}
        offset = end
    return 8 + 8 * math.ceil(len(json.dumps(header, separators=(",", ":")).encode()) / 8) + offset

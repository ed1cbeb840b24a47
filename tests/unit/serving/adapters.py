"""Adapters that tests serve: random, and large enough that each one writes another text."""

from __future__ import annotations

from pathlib import Path

import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.methods.base import LoraFactors
from rayft.numerics import generator

RANKS = {"small": 2, "middle": 4, "large": 8}
SELECTOR = "picks"


def random_adapter(
    name: str,
    shapes: dict[str, tuple[int, int]],
    fingerprint: str = "",
    rank: int = 4,
    selector: bool = False,
) -> AdapterArtifact:
    modules = {}
    for path, (outputs, inputs) in shapes.items():
        random = generator(name, path)
        a = torch.randn(rank, inputs, generator=random) / inputs**0.5
        b = 0.5 * torch.randn(outputs, rank, generator=random)
        columns = None
        if selector:
            columns = tuple(torch.randperm(inputs, generator=random)[:rank].tolist())
            a = torch.eye(inputs)[list(columns)]
        modules[path] = LoraFactors(a, b, 0.8, columns)
    return AdapterArtifact(modules, meta=ArtifactMeta(base_model="tiny", base_fingerprint=fingerprint))


def save_adapters(folder: Path, shapes: dict[str, tuple[int, int]], fingerprint: str) -> dict[str, str]:
    """Save three LoRAs of different ranks and a selector; give name → folder."""
    made = {name: random_adapter(name, shapes, fingerprint, rank) for name, rank in RANKS.items()}
    made[SELECTOR] = random_adapter(SELECTOR, shapes, fingerprint, 6, selector=True)
    return {name: str(adapter.save(folder / name)) for name, adapter in made.items()}

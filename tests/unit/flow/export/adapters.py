"""Random adapters of small models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.methods.base import LoraFactors
from rayft.models.load import ModelConfig, load_skeleton
from rayft.models.targets import is_transposed, linear_shapes
from rayft.numerics import generator


def random_adapter(
    base: ModelConfig, chosen: Sequence[str] = (), *, rank: int = 4, step: int = 0, size: float = 0.1
) -> AdapterArtifact:
    """Return an adapter of all linear layers, or of those whose paths end with a chosen name.

    Args:
        base: the base.
        chosen: ends of paths.
        rank: of the first module.
        step: what each second module's rank is higher by; scales differ from module to module then.
        size: of the numbers in B.
    """
    modules, skeleton = {}, load_skeleton(base)
    for index, (name, (outputs, inputs)) in enumerate(linear_shapes(skeleton).items()):
        if chosen and not name.endswith(tuple(chosen)):
            continue
        draw, own = generator(0, name), rank + step * (index % 2)
        a = torch.randn(own, inputs, generator=draw)
        b = size * torch.randn(outputs, own, generator=draw)
        modules[name] = LoraFactors(a, b, 1.5 + step * (index % 3))
    turned = any(is_transposed(skeleton.get_submodule(name)) for name in modules)
    return AdapterArtifact(
        modules, meta=ArtifactMeta(task=base.task, base_model=base.name, transposed=turned)
    )

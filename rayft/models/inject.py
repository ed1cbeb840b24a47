"""Put adapters into a model, take them out again, and read them off as an artifact.

The linear layers of a model are wrapped once (`wrap`); after that a trial only swaps what hangs in
them, so a base in memory serves one trial after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import MethodError
from rayft.methods import method
from rayft.methods.base import AdapterLinear, LayerShape, MethodConfig
from rayft.methods.lora import LoraAdapter
from rayft.models.targets import check, linear_shapes, linears
from rayft.numerics import generator

__all__ = ["Injected", "attach", "clear", "export", "heads", "inject", "reset_heads", "wrap"]

HEAD_NAMES = ("score", "classifier")


@dataclass(frozen=True)
class Injected:
    """What a method put into a model."""

    modules: tuple[str, ...]
    """Adapted module paths."""
    trainable: int
    """Numbers that train, heads included."""


def wrap(model: nn.Module) -> None:
    """Replace each linear layer by an `AdapterLinear` that holds the same parameters (once)."""
    for name, layer in linears(model).items():
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, AdapterLinear(layer))


def inject(model: nn.Module, config: MethodConfig, seed: int) -> Injected:
    """Give the targets fresh adapters and set what trains; all that was there before is taken out.

    Each module draws from a generator of its own, seeded by (seed, module path): the same adapters
    come out whatever else is in the model and wherever it runs.

    Raises:
        TargetError: if targets match nothing or can't hold the rank.
    """
    wrap(model)
    chosen = check(model, config)
    clear(model)
    kind = method(config.name)
    if not kind.shares_base:
        model.requires_grad_(True)
    for name in chosen:
        layer = model.get_submodule(name)
        assert isinstance(layer, AdapterLinear)
        layer.adapter = kind.build(layer, config, generator(seed, name))
    for head in heads(model).values():
        head.requires_grad_(True)
    if kind.shares_base:
        _check_count(model, chosen, config)
    return Injected(tuple(chosen), sum(p.numel() for p in model.parameters() if p.requires_grad))


def attach(model: nn.Module, artifact: AdapterArtifact) -> None:
    """Put a saved adapter in (frozen), casting it to the layers' dtype and device."""
    wrap(model)
    clear(model)
    for name, factors in artifact.modules.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, AdapterLinear)
        like = layer.weight
        a, b = (t.to(like.device, like.dtype) for t in (factors.a, factors.b))
        layer.adapter = LoraAdapter(a, b, factors.scale).requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name, value in artifact.heads.items():
        parameters[name].data.copy_(value)


def clear(model: nn.Module) -> None:
    """Take all adapters out and freeze the model."""
    for module in model.modules():
        if isinstance(module, AdapterLinear):
            module.adapter = None
    model.requires_grad_(False)


def export(model: nn.Module, meta: ArtifactMeta) -> AdapterArtifact:
    """Read the adapters off a model, copied to the CPU.

    Raises:
        MethodError: if the method has no low-rank factors.
    """
    if not method(meta.method).exports_lora:
        raise MethodError(f"'{meta.method}' trains the model itself; save the model folder instead")
    modules = {}
    for name, layer in linears(model).items():
        if isinstance(layer, AdapterLinear) and layer.adapter is not None:
            factors = layer.adapter.to_lora()
            modules[name] = type(factors)(
                factors.a.cpu().clone(), factors.b.cpu().clone(), factors.scale, factors.columns
            )
    saved = {
        f"{path}.{leaf}" if leaf else path: value.detach().cpu().clone()
        for path, head in heads(model).items()
        for leaf, value in head.named_parameters()
    }
    return AdapterArtifact(modules=modules, heads=saved, meta=meta)


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """Find the classification heads: they start at random and train whole."""
    found = {name: getattr(model, name, None) for name in HEAD_NAMES}
    return {name: head for name, head in found.items() if isinstance(head, nn.Module)}


def reset_heads(model: nn.Module, seed: int) -> None:
    """Draw the classification heads anew (σ = 0.02, biases 0), so that a lane's trials start alike."""
    for path, head in heads(model).items():
        for name, parameter in head.named_parameters():
            fresh = torch.empty(parameter.shape).normal_(0, 0.02, generator=generator(seed, path, name))
            parameter.data.copy_(fresh if parameter.ndim > 1 else torch.zeros(parameter.shape))


def _check_count(model: nn.Module, chosen: list[str], config: MethodConfig) -> None:
    shapes, kind = linear_shapes(model), method(config.name)
    expected = sum(kind.trained(LayerShape(*shapes[name]), config.rank) for name in chosen)
    head = sum(p.numel() for h in heads(model).values() for p in h.parameters())
    actual = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert actual == expected + head, (
        f"{config.name} trains {actual} numbers, its formula says {expected} + {head}"
    )

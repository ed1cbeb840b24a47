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
from rayft.models import rivals
from rayft.models.peft_folder import PeftFolder
from rayft.models.targets import check, heads, linear_shapes, linears
from rayft.numerics import generator

__all__ = ["Injected", "advance", "attach", "clear", "export", "inject", "reset_heads", "wrap"]


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
        if not isinstance(layer, AdapterLinear):
            parent, _, child = name.rpartition(".")
            wrapped = AdapterLinear(layer, dtype=getattr(model, "dtype", None))
            wrapped.train(layer.training)
            setattr(model.get_submodule(parent), child, wrapped)


def inject(model: nn.Module, config: MethodConfig, seed: int) -> Injected:
    """Give the targets fresh adapters and set what trains; all that was there before is taken out.

    Each module draws from a generator of its own, seeded by (seed, module path): the same adapters
    come out whatever else is in the model and wherever it runs.

    Raises:
        TargetError: if targets match nothing or can't hold the rank.
        MethodError: if PEFT can't put a rival in.
    """
    rivals.take_out(model)
    wrap(model)
    chosen = check(model, config)
    clear(model)
    kind = method(config.name)
    if not kind.shares_base:
        model.requires_grad_(True)
    if kind.rival:
        rivals.put_in(model, config, chosen, seed)
    for name in [] if kind.rival else chosen:
        layer = model.get_submodule(name)
        assert isinstance(layer, AdapterLinear)
        layer.adapter = kind.build(layer, config.of(name), generator(seed, name))
        layer.adapter.dropout = config.dropout
    for head in heads(model).values():
        head.requires_grad_(True)
    if kind.shares_base and not kind.rival:
        _check_count(model, chosen, config)
    return Injected(tuple(chosen), sum(p.numel() for p in model.parameters() if p.requires_grad))


def advance(model: nn.Module, seed: int, link: int) -> None:
    """Freeze the link that trained in every adapter of a chain and begin link number `link` (from 0).

    Raises:
        MethodError: if the adapters are no chains.
    """
    for name, layer in linears(model).items():
        if isinstance(layer, AdapterLinear) and layer.adapter is not None:
            layer.adapter.advance(generator(seed, name, "link", link))


def attach(model: nn.Module, artifact: AdapterArtifact | PeftFolder) -> None:
    """Put a saved adapter in (frozen), casting it to the layers' dtype and device."""
    rivals.take_out(model)
    wrap(model)
    clear(model)
    if isinstance(artifact, PeftFolder):
        rivals.attach(model, artifact)
        return
    for name, factors in artifact.modules.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, AdapterLinear)
        a, b = (t.to(layer.weight.device, layer.dtype) for t in (factors.a, factors.b))
        layer.adapter = LoraAdapter(a, b, factors.scale).requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name, value in artifact.heads.items():
        parameters[name].data.copy_(value)


def clear(model: nn.Module) -> None:
    """Take all adapters out, undo what they changed in the base, and freeze the model."""
    rivals.take_out(model)
    for module in model.modules():
        if isinstance(module, AdapterLinear) and module.adapter is not None:
            if not module.quantised:
                module.adapter.restore(module.matrix)
            module.adapter = None
    model.requires_grad_(False)


def export(model: nn.Module, meta: ArtifactMeta) -> AdapterArtifact | PeftFolder:
    """Read the adapters off a model, copied to the CPU: LoRA factors, or PEFT's own folder of a rival.

    Raises:
        MethodError: if the method trains the model itself.
    """
    kind = method(meta.method)
    if kind.rival:
        return rivals.export(model, meta)
    if not kind.exports_lora:
        raise MethodError(f"'{meta.method}' trains the model itself; save the model folder instead")
    modules, transposed = {}, False
    for name, layer in linears(model).items():
        if isinstance(layer, AdapterLinear) and layer.adapter is not None:
            transposed |= layer.transposed
            factors = layer.adapter.to_lora()
            modules[name] = type(factors)(
                factors.a.cpu().clone(), factors.b.cpu().clone(), factors.scale, factors.columns
            )
    saved = {
        f"{path}.{leaf}" if leaf else path: value.detach().cpu().clone()
        for path, head in heads(model).items()
        for leaf, value in head.named_parameters()
    }
    meta = meta.model_copy(update={"transposed": transposed})
    return AdapterArtifact(modules=modules, heads=saved, meta=meta)


def reset_heads(model: nn.Module, seed: int) -> None:
    """Draw the classification heads anew (σ = 0.02, norms 1, biases 0): a lane's trials start alike."""
    for path, head in heads(model).items():
        for name, parameter in head.named_parameters():
            fresh = torch.full(parameter.shape, float(name.endswith("weight")))
            if parameter.ndim > 1:
                fresh.normal_(0, 0.02, generator=generator(seed, path, name))
            parameter.data.copy_(fresh)


def _check_count(model: nn.Module, chosen: list[str], config: MethodConfig) -> None:
    shapes, kind = linear_shapes(model), method(config.name)
    expected = sum(kind.trained(LayerShape(*shapes[name]), config.of(name).rank) for name in chosen)
    head = sum(p.numel() for h in heads(model).values() for p in h.parameters())
    actual = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert actual == expected + head, (
        f"{config.name} trains {actual} numbers, its formula says {expected} + {head}"
    )

"""Put adapters into a model, take them out again, and read them off as an artifact.

The linear layers of a model are wrapped once (`wrap`); after that a trial only swaps what hangs in
them, so a base in memory serves one trial after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rayft.artifacts import PREFIX, AdapterArtifact, ArtifactMeta
from rayft.errors import BaseMismatchError, MethodError
from rayft.methods import method
from rayft.methods.base import AdapterLinear, LayerShape, LoraFactors, MethodConfig
from rayft.methods.lora import LoraAdapter
from rayft.models import rivals
from rayft.models.heads import head_parameters, restore
from rayft.models.peft_folder import PeftFolder
from rayft.models.targets import check, linear_shapes, linears
from rayft.numerics import generator

__all__ = [
    "Injected",
    "advance",
    "attach",
    "check_fits",
    "clear",
    "export",
    "factors_of",
    "inject",
    "refit",
    "wrap",
]


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


def inject(
    model: nn.Module, config: MethodConfig, seed: int, start: Mapping[str, LoraFactors] | None = None
) -> Injected:
    """Give the targets fresh adapters and set what trains; all that was there before is taken out.

    Heads are then as they were loaded; `reset_heads` starts them for a trial.

    Each module draws from a generator of its own, seeded by (seed, module path): the same adapters
    come out whatever else is in the model and wherever it runs.

    Args:
        model: the base.
        config: the method.
        seed: decides fresh adapters.
        start: factors to start from, which fit the model: they say which modules, ranks and scales.

    Raises:
        TargetError: if targets match nothing or can't hold the rank.
        MethodError: if PEFT can't put a rival in.
    """
    rivals.take_out(model)
    wrap(model)
    chosen = check(model, config) if start is None else list(start)
    clear(model)
    kind = method(config.name)
    if not kind.shares_base:
        model.requires_grad_(True)
    if kind.rival:
        rivals.put_in(model, config, chosen, seed)
    for name in [] if kind.rival else chosen:
        layer = model.get_submodule(name)
        assert isinstance(layer, AdapterLinear)
        if start is None:
            layer.adapter = kind.build(layer, config.of(name), generator(seed, name))
        else:
            # Copied: training must leave what it was given as it is.
            f = start[name]
            layer.adapter = _adapter(layer, LoraFactors(f.a.clone(), f.b.clone(), f.scale))
        layer.adapter.dropout = config.dropout
    for head in head_parameters(model).values():
        head.requires_grad_(True)
    if kind.shares_base and not kind.rival:
        ranks = {name: config.of(name).rank if start is None else start[name].rank for name in chosen}
        _check_count(model, ranks, config)
    return Injected(tuple(chosen), sum(p.numel() for p in model.parameters() if p.requires_grad))


def advance(model: nn.Module, seed: int, link: int) -> None:
    """Freeze the link that trained in every adapter of a chain and begin link number `link` (from 0).

    Raises:
        MethodError: if the adapters are no chains.
    """
    for name, layer in linears(model).items():
        if isinstance(layer, AdapterLinear) and layer.adapter is not None:
            layer.adapter.advance(generator(seed, name, "link", link))


def factors_of(model: nn.Module) -> dict[str, LoraFactors]:
    """Read the factors off a model: path of each adapted module → its factors, detached."""
    return {
        name: layer.adapter.to_lora()
        for name, layer in linears(model).items()
        if isinstance(layer, AdapterLinear) and layer.adapter is not None
    }


def refit(model: nn.Module, modules: Mapping[str, LoraFactors]) -> None:
    """Give adapted modules other factors to train, at any rank; dropout stays."""
    for name, factors in modules.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, AdapterLinear)
        assert layer.adapter is not None
        new = _adapter(layer, factors)
        new.dropout = layer.adapter.dropout
        layer.adapter = new.train(layer.training)


def attach(model: nn.Module, artifact: AdapterArtifact | PeftFolder) -> None:
    """Put a saved adapter in (frozen), casting it to the layers' dtype and device.

    Raises:
        BaseMismatchError: if the model lacks one of its modules or heads, or has it in another size; the
            model is then as it was (of a rival, sizes are found out after what was in has gone).
        MethodError: if PEFT can't put a rival in.
    """
    check_fits(model, artifact)
    clear(model)
    wrap(model)
    if isinstance(artifact, PeftFolder):
        rivals.attach(model, artifact)
    else:
        for name, factors in artifact.modules.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, AdapterLinear)
            layer.adapter = _adapter(layer, factors).requires_grad_(False)
    parameters = head_parameters(model)
    for name, value in artifact.heads.items():
        parameters[name].data.copy_(value)


def clear(model: nn.Module) -> None:
    """Take all adapters out, undo what they changed in the base and its heads, and freeze the model."""
    rivals.take_out(model)
    for module in model.modules():
        if isinstance(module, AdapterLinear) and module.adapter is not None:
            if not module.quantised:
                module.adapter.restore(module.matrix)
            module.adapter = None
    restore(model)
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
    modules = {
        name: LoraFactors(f.a.cpu().clone(), f.b.cpu().clone(), f.scale, f.columns)
        for name, f in factors_of(model).items()
    }
    layers = (model.get_submodule(name) for name in modules)
    transposed = any(isinstance(layer, AdapterLinear) and layer.transposed for layer in layers)
    saved = {name: value.detach().cpu().clone() for name, value in head_parameters(model).items()}
    meta = meta.model_copy(update={"transposed": transposed})
    return AdapterArtifact(modules=modules, heads=saved, meta=meta)


def _adapter(layer: AdapterLinear, factors: LoraFactors) -> LoraAdapter:
    """Make an adapter of factors, in the layer's dtype and on its device."""
    a, b = (t.to(layer.weight.device, layer.dtype).contiguous() for t in (factors.a, factors.b))
    return LoraAdapter(a, b, factors.scale)


def check_fits(model: nn.Module, artifact: AdapterArtifact | PeftFolder, fingerprint: str = "") -> None:
    """Refuse an adapter of another base by its names and, for what is not PEFT's, sizes and fingerprint.

    Raises:
        BaseMismatchError: naming what the model lacks or has in another size.
    """
    shapes, own = rivals.base_shapes(model), head_parameters(model)
    if isinstance(artifact, AdapterArtifact):
        artifact.check_base(fingerprint, shapes)
    else:
        for key in artifact.adapter:
            name = key.removeprefix(PREFIX)
            if key.startswith(PREFIX) and not any(path in shapes for path in _above(name)):
                raise BaseMismatchError(
                    f"the base has no linear layer for {name}; the adapter is for another model, use it with "
                    "its own base or train it again on this one"
                )
    for name, value in artifact.heads.items():
        if name not in own:
            raise BaseMismatchError(
                f"the base has no classification head {name}, which the adapter trains whole: load the base "
                f"with model.task: {artifact.meta.task} if that is a head there, or use the adapter with "
                "PEFT itself"
            )
        if own[name].shape != value.shape:
            raise BaseMismatchError(
                f"{name} is {_size(own[name])} in the base and {_size(value)} in the adapter: load the base "
                "with the model.num_labels that the adapter was trained for, or use its own base"
            )


def _above(name: str) -> list[str]:
    """List the modules that a parameter is in, innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _check_count(model: nn.Module, ranks: Mapping[str, int], config: MethodConfig) -> None:
    shapes, kind = linear_shapes(model), method(config.name)
    expected = sum(kind.trained(LayerShape(*shapes[name]), rank) for name, rank in ranks.items())
    head = sum(p.numel() for p in head_parameters(model).values())
    actual = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert actual == expected + head, (
        f"{config.name} trains {actual} numbers, its formula says {expected} + {head}"
    )

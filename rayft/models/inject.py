"""Put adapters into a model, take them out again, and read them off as an artifact.

The linear layers of a model are wrapped once (`wrap`); after that a trial only swaps what hangs in
them, so a base in memory serves one trial after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rayft.artifacts import PREFIX, AdapterArtifact, ArtifactMeta
from rayft.errors import BaseMismatchError, MethodError
from rayft.methods import method
from rayft.methods.base import AdapterLinear, LayerShape, MethodConfig
from rayft.methods.lora import LoraAdapter
from rayft.models import rivals
from rayft.models.heads import head_parameters, restore
from rayft.models.peft_folder import PeftFolder
from rayft.models.targets import check, linear_shapes, linears
from rayft.numerics import generator

__all__ = ["Injected", "advance", "attach", "clear", "export", "inject", "wrap"]


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

    Heads are then as they were loaded; `reset_heads` starts them for a trial.

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
    for head in head_parameters(model).values():
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
    """Put a saved adapter in (frozen), casting it to the layers' dtype and device.

    Raises:
        BaseMismatchError: if the model lacks one of its modules or heads, or has it in another size; the
            model is then as it was (of a rival, sizes are found out after what was in has gone).
        MethodError: if PEFT can't put a rival in.
    """
    _check_fits(model, artifact)
    clear(model)
    wrap(model)
    if isinstance(artifact, PeftFolder):
        rivals.attach(model, artifact)
    else:
        for name, factors in artifact.modules.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, AdapterLinear)
            a, b = (t.to(layer.weight.device, layer.dtype) for t in (factors.a, factors.b))
            layer.adapter = LoraAdapter(a, b, factors.scale).requires_grad_(False)
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
    modules, transposed = {}, False
    for name, layer in linears(model).items():
        if isinstance(layer, AdapterLinear) and layer.adapter is not None:
            transposed |= layer.transposed
            factors = layer.adapter.to_lora()
            modules[name] = type(factors)(
                factors.a.cpu().clone(), factors.b.cpu().clone(), factors.scale, factors.columns
            )
    saved = {name: value.detach().cpu().clone() for name, value in head_parameters(model).items()}
    meta = meta.model_copy(update={"transposed": transposed})
    return AdapterArtifact(modules=modules, heads=saved, meta=meta)


def _check_fits(model: nn.Module, artifact: AdapterArtifact | PeftFolder) -> None:
    """Refuse an adapter of another base by its names and, for what is not PEFT's, its sizes."""
    shapes, own = rivals.base_shapes(model), head_parameters(model)
    if isinstance(artifact, AdapterArtifact):
        artifact.check_base("", shapes)
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
                f"the base has no classification head {name}, which the adapter trained whole: load the base "
                f"with model.task: {artifact.meta.task}, or use the adapter with its own base"
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


def _check_count(model: nn.Module, chosen: list[str], config: MethodConfig) -> None:
    shapes, kind = linear_shapes(model), method(config.name)
    expected = sum(kind.trained(LayerShape(*shapes[name]), config.of(name).rank) for name in chosen)
    head = sum(p.numel() for p in head_parameters(model).values())
    actual = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert actual == expected + head, (
        f"{config.name} trains {actual} numbers, its formula says {expected} + {head}"
    )

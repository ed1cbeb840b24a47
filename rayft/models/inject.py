"""Put adapters into a model, take them out again, and export them as an artifact.

The linear layers of a model are wrapped once (`wrap`). After that a trial only changes the adapter that an
`AdapterLinear` has, so that a base in memory serves one trial after the other.

There are two kinds of layers, `rayft`'s own and PEFT's, behind one contract (`Layers`). The method decides
which kind a trial gets, and the type of an artifact which kind it is attached by; callers need not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Protocol

import torch
from torch import nn

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import BaseMismatchError, MethodError
from rayft.methods.base import Adapter, AdapterLinear, LayerShape, LoraFactors, Method, MethodConfig
from rayft.methods.lora import LoraAdapter
from rayft.models.heads import head_parameters, restore
from rayft.models.methods import method
from rayft.models.targets import check, linear_shapes, linears
from rayft.numerics import generator
from rayft.peft.folder import Artifact, PeftFolder
from rayft.peft.layers import PeftLayers
from rayft.peft.method import PeftMethod

__all__ = [
    "Injected",
    "Layers",
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

AT_ONCE = 2**26
"""About how many bytes are joined on a GPU to be copied to the CPU."""


class Layers(Protocol):
    """How one kind of layers gets into a model and out of it again.

    The model is frozen and wrapped, and has no adapters, when `put_in` and `attach` are called.
    """

    def put_in(self, model: nn.Module, config: MethodConfig, chosen: Sequence[str], seed: int) -> None:
        """Put fresh adapters into the chosen layers, and set what trains; heads are the caller's.

        Raises:
            MethodError: if the layers can't be made; the model is then as it was.
        """

    def take_out(self, model: nn.Module) -> None:
        """Take all adapters of this kind out, and undo what they changed in the base, bit by bit."""

    def attach(self, model: nn.Module, artifact: Artifact) -> None:
        """Put a saved adapter in, frozen; heads are the caller's.

        Raises:
            BaseMismatchError: if it is for another model.
        """

    def export(self, model: nn.Module, heads: Mapping[str, torch.Tensor], meta: ArtifactMeta) -> Artifact:
        """Read the adapters off a model, copied to the CPU.

        Raises:
            MethodError: if the method leaves no adapter behind.
        """


@dataclass(frozen=True)
class Injected:
    """What a method put into a model."""

    modules: tuple[str, ...]
    """Paths of the adapted modules."""
    trainable: int
    """Count of the numbers that train, heads included."""


def wrap(model: nn.Module) -> None:
    """Replace each linear layer by an `AdapterLinear` with the same parameters; wrapped ones stay."""
    for name, layer in linears(model).items():
        if not isinstance(layer, AdapterLinear):
            parent, _, child = name.rpartition(".")
            wrapped = AdapterLinear(layer, dtype=getattr(model, "dtype", None))
            wrapped.train(layer.training)
            setattr(model.get_submodule(parent), child, wrapped)


def inject(
    model: nn.Module, config: MethodConfig, seed: int, start: Mapping[str, LoraFactors] | None = None
) -> Injected:
    """Take out all adapters, give the targets fresh ones, and set what trains.

    Heads are then as they were loaded; `reset_heads` starts them for a trial.

    Each module draws from a generator of its own, seeded by (seed, module path): the same adapters
    come out whatever else is in the model and wherever it runs. (PEFT's layers draw all at once.)

    Args:
        model: the base.
        config: the method.
        seed: decides fresh adapters.
        start: factors to start from, which fit the model: module path → factors. They decide which
            modules are adapted, and at which rank and scale.

    Raises:
        TargetError: if targets match nothing or can't hold the rank.
        MethodError: if a setting would do nothing, the method can't train on this base, or PEFT can't
            make its layers.
    """
    PEFT.take_out(model)
    wrap(model)
    chosen = check(model, config) if start is None else list(start)
    clear(model)
    if start is None:
        _layers(method(config.name)).put_in(model, config, chosen, seed)
    else:
        OWN.start_from(model, config, start)
    for head in head_parameters(model).values():
        head.requires_grad_(True)
    return Injected(tuple(chosen), _count_trainable(model))


def advance(model: nn.Module, seed: int, link: int) -> None:
    """Freeze the link that trained in every adapter of a chain, and begin link number `link` (from 0).

    Raises:
        MethodError: if the adapters are no chains.
    """
    for name, adapter in _adapters(model).items():
        adapter.advance(generator(seed, name, "link", link))


def factors_of(model: nn.Module) -> dict[str, LoraFactors]:
    """Return the factors of the adapters in a model: path of each adapted module → factors, detached."""
    return {name: adapter.to_lora() for name, adapter in _adapters(model).items()}


def refit(model: nn.Module, modules: Mapping[str, LoraFactors]) -> None:
    """Replace the adapters of adapted modules by given factors, of any rank; dropout stays."""
    for name, factors in modules.items():
        layer = _at(model, name)
        assert layer.adapter is not None
        new = _adapter(layer, factors)
        new.dropout = layer.adapter.dropout
        layer.adapter = new.train(layer.training)


def attach(model: nn.Module, artifact: Artifact) -> None:
    """Put a saved adapter in, frozen and in the layers' dtype and device, and set its heads.

    Raises:
        BaseMismatchError: if the model lacks one of its modules or heads, or has it in another size. The
            model is then as it was, except that PEFT compares sizes only after the adapters that were in
            the model have been taken out.
        MethodError: if PEFT can't make its layers.
    """
    check_fits(model, artifact)
    clear(model)
    wrap(model)
    _layers(artifact).attach(model, artifact)
    parameters = head_parameters(model)
    for name, value in artifact.heads.items():
        parameters[name].data.copy_(value)


def clear(model: nn.Module) -> None:
    """Take all adapters out, undo what they changed in the base and its heads, and freeze the model."""
    for layers in (PEFT, OWN):
        layers.take_out(model)
    restore(model)
    model.requires_grad_(False)


def export(model: nn.Module, meta: ArtifactMeta) -> Artifact:
    """Read the adapters off a model, copied to the CPU: as LoRA factors, or else in PEFT's own format.

    Raises:
        MethodError: if the method trains the model itself.
    """
    heads = {name: value.detach().cpu().clone() for name, value in head_parameters(model).items()}
    return _layers(method(meta.method)).export(model, heads, meta)


def check_fits(model: nn.Module, artifact: Artifact, fingerprint: str = "") -> None:
    """Refuse an adapter of another base: by its modules' names and, of LoRA factors, sizes and fingerprint.

    Raises:
        BaseMismatchError: naming what the model lacks or has in another size.
    """
    own = head_parameters(model)
    artifact.check_base(fingerprint, linear_shapes(model))
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


class OwnLayers:
    """`rayft`'s own: adapters hang in `AdapterLinear`s."""

    def put_in(self, model: nn.Module, config: MethodConfig, chosen: Sequence[str], seed: int) -> None:
        """Let the method build an adapter for each chosen layer."""
        kind = method(config.name)
        kind.prepare(model)
        for name in chosen:
            layer = _at(model, name)
            layer.adapter = kind.build(layer, config.of(name), generator(seed, name))
            layer.adapter.dropout = config.dropout
        if kind.shares_base:
            _check_count(model, {name: config.of(name).rank for name in chosen}, kind)

    def start_from(self, model: nn.Module, config: MethodConfig, start: Mapping[str, LoraFactors]) -> None:
        """Put adapters into layers that start from given factors: module path → factors."""
        for name, factors in start.items():
            layer = _at(model, name)
            # Copied, because training must not change what was given.
            copied = LoraFactors(factors.a.clone(), factors.b.clone(), factors.scale)
            layer.adapter = _adapter(layer, copied)
            layer.adapter.dropout = config.dropout
        _check_count(model, {name: factors.rank for name, factors in start.items()}, method(config.name))

    def take_out(self, model: nn.Module) -> None:
        """Take the adapters out, and let each restore what it changed in its layer's weight."""
        for module in model.modules():
            if isinstance(module, AdapterLinear) and module.adapter is not None:
                if not module.quantised:
                    module.adapter.restore(module.matrix)
                module.adapter = None

    def attach(self, model: nn.Module, artifact: Artifact) -> None:
        """Put in an adapter of each module's factors."""
        assert isinstance(artifact, AdapterArtifact)
        for name, factors in artifact.modules.items():
            layer = _at(model, name)
            layer.adapter = _adapter(layer, factors).requires_grad_(False)

    def export(self, model: nn.Module, heads: Mapping[str, torch.Tensor], meta: ArtifactMeta) -> Artifact:
        """Copy the factors.

        Raises:
            MethodError: if the method trains the model itself.
        """
        if method(meta.method).saves_model:
            raise MethodError(f"'{meta.method}' trains the model itself; save the model folder instead")
        layers = _adapted(model)
        found = [adapter.to_lora() for adapter in _on_cpu([*map(_adapter_of, layers.values())])]
        modules = {
            name: LoraFactors(f.a.cpu().clone(), f.b.cpu().clone(), f.scale, f.columns)
            for name, f in zip(layers, found, strict=True)
        }
        transposed = any(layer.transposed for layer in layers.values())
        meta = meta.model_copy(update={"transposed": transposed})
        return AdapterArtifact(modules=modules, heads=heads, meta=meta)


OWN, PEFT = OwnLayers(), PeftLayers()


def _layers(of: Method | Artifact) -> Layers:
    """Return the kind of layers that a method trains in, or an artifact is attached by."""
    return PEFT if isinstance(of, PeftMethod | PeftFolder) else OWN


def _adapters(model: nn.Module) -> dict[str, Adapter]:
    return {name: _adapter_of(layer) for name, layer in _adapted(model).items()}


def _adapted(model: nn.Module) -> dict[str, AdapterLinear]:
    """Return the layers that have adapters, by their paths."""
    return {
        name: layer
        for name, layer in linears(model).items()
        if isinstance(layer, AdapterLinear) and layer.adapter is not None
    }


def _adapter_of(layer: AdapterLinear) -> Adapter:
    assert layer.adapter is not None
    return layer.adapter


def _on_cpu(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return copies of adapters, for reading, whose own parameters and buffers are on the CPU."""
    own = [_tensors(adapter) for adapter in adapters]
    moved = iter(_copied([tensor for tensors in own for tensor in tensors.values()]))
    found = []
    for adapter, tensors in zip(adapters, own, strict=True):
        copied = object.__new__(type(adapter))
        absent = dict.fromkeys(name for name, buffer in adapter._buffers.items() if buffer is None)
        # All as buffers: what is read of a parameter is its value.
        buffers = {**absent, **{name: next(moved) for name in tensors}}
        copied.__dict__.update(adapter.__dict__ | {"_parameters": {}, "_buffers": buffers})
        found.append(copied)
    return found


def _tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return an adapter's own parameters and buffers, without those of modules in it."""
    every = {**adapter._parameters, **adapter._buffers}
    return {name: tensor for name, tensor in every.items() if tensor is not None}


def _copied(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy tensors to the CPU: many at once, since each copy from a GPU waits for all that it computes."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(number)
    found: dict[int, torch.Tensor] = {}
    for numbers in kinds.values():
        ends = accumulate(tensors[number].nbytes for number in numbers)
        for _, part in groupby(zip(numbers, ends, strict=True), key=lambda one: one[1] // AT_ONCE):
            some = [number for number, _ in part]
            flat = torch.cat([tensors[number].detach().reshape(-1) for number in some]).cpu()
            pieces = flat.split([tensors[number].numel() for number in some])
            found |= {n: piece.view(tensors[n].shape) for n, piece in zip(some, pieces, strict=True)}
    return [found[number] for number in range(len(tensors))]


def _at(model: nn.Module, name: str) -> AdapterLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, AdapterLinear)
    return layer


def _adapter(layer: AdapterLinear, factors: LoraFactors) -> LoraAdapter:
    """Return an adapter with given factors, in the layer's dtype and on its device."""
    a, b = (t.to(layer.weight.device, layer.dtype).contiguous() for t in (factors.a, factors.b))
    return LoraAdapter(a, b, factors.scale)


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _count_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _check_count(model: nn.Module, ranks: Mapping[str, int], kind: Method) -> None:
    shapes, actual = linear_shapes(model), _count_trainable(model)
    expected = sum(kind.trained(LayerShape(*shapes[name]), rank) for name, rank in ranks.items())
    assert actual == expected, f"{kind.name} trains {actual} numbers, its formula says {expected}"

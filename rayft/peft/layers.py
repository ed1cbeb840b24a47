"""PEFT's own layers: PEFT puts them into a model, and they are taken out again without a trace.

While they are in, a plain layer with the same parameters stands in the place of each `AdapterLinear`, and
PEFT wraps that. When they are taken out, the `AdapterLinear`s come back, and each parameter gets back the
storage that it had. PiSSA and others give a parameter another weight; it never reaches the base.

PEFT draws from torch's global state. The state is seeded with the run's seed while PEFT draws, and restored
afterwards. So the same layers come out whatever ran before; unlike those of our methods, they depend on
which other layers are adapted.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import BaseMismatchError, MethodError
from rayft.methods.base import AdapterLinear, LoraFactors, MethodConfig
from rayft.numerics import derive_seed, seed_everything
from rayft.peft.folder import Artifact, PeftFolder
from rayft.peft.method import peft_method

__all__ = ["PeftLayers", "layers_inside", "put_aside", "stated_delta"]

INSIDE = "_rayft_peft"
"""Attribute of a model that has PEFT's layers in it."""
ADAPTER = "default"
"""PEFT's name for the one adapter."""
FROM_BASE = ("pissa", "olora")
"""Starts by which PEFT takes factors out of the base's weight."""


@dataclass
class _Inside:
    """What is restored when PEFT's layers are taken out, and what is needed to export them."""

    layers: dict[str, AdapterLinear]
    """Module path → the layer that was there."""
    storage: list[tuple[nn.Parameter, torch.Tensor]]
    """Parameters of those layers, each with the tensor that held its numbers."""
    tuner: Any = None
    """PEFT's model, which registers ours as a submodule; ours must not register it."""
    start: dict[str, LoraFactors] = field(default_factory=dict)
    """Module path → the factors that the layer took out of the base's weight at its start."""


class _Root(nn.Module):
    """A stand-in for `PeftModel`: it gives tensors the names that PEFT's files use, and does nothing else."""

    def __init__(self, tuner: Any) -> None:
        super().__init__()
        self.base_model = tuner
        self.peft_config = tuner.peft_config


def put_aside(model: nn.Module) -> dict[str, AdapterLinear] | None:
    """Return the layers that PEFT's replace: module path → layer; None if PEFT's are not in the model."""
    inside: _Inside | None = getattr(model, INSIDE, None)
    return None if inside is None else inside.layers


def layers_inside(model: nn.Module) -> dict[str, nn.Module]:
    """Return PEFT's layers in a model that has some: module path → layer."""
    inside: _Inside = getattr(model, INSIDE)
    return {name: model.get_submodule(name) for name in inside.tuner.targeted_module_names}


def stated_delta(layer: Any) -> torch.Tensor:
    """Return what a layer of PEFT states as its ΔW; in most classes it is laid out as the weight is stored.

    Exceptions that PEFT raises for classes which have no ΔW are not caught.
    """
    if hasattr(layer, "miss_block"):
        # PEFT's function takes the weight, and returns both together.
        return _miss(layer).delta()
    return torch.as_tensor(layer.get_delta_weight(ADAPTER)).detach().to_dense()  # SHiRA's is sparse


class PeftLayers:
    """How adapters of `peft:<Class>` get into a model and out of it again (see `rayft.models.inject`)."""

    def put_in(self, model: nn.Module, config: MethodConfig, chosen: Sequence[str], seed: int) -> None:
        """Have PEFT put fresh layers into the chosen ones; only they train then.

        Raises:
            MethodError: if PEFT can't, with its reason; the model is then as it was.
        """
        kind, layers = peft_method(config.name), _wrapped(model)
        adapted = {name: layers[name] for name in chosen}
        turned = {layer.transposed and not layer.quantised for layer in adapted.values()}
        if len(turned) > 1:
            raise MethodError(
                f"'{kind.name}' can't adapt Conv1D and Linear layers at once: choose one of them by targets"
            )
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in adapted.items()}
        settings = kind.peft_config(config, shapes, seed, transposed=turned.pop())
        from_base = str(getattr(settings, "init_lora_weights", "")).startswith(FROM_BASE)
        if from_base and any(layer.quantised for layer in adapted.values()):
            raise MethodError(
                f"'{kind.name}' starts from the base's weights, which are quantised: drop model.quantize, or "
                "use peft:LoRA"
            )
        _inject(model, kind.name, settings, chosen, seed)
        inside: _Inside = getattr(model, INSIDE)
        if from_base:
            inside.start = {name: _copied(_lora(model.get_submodule(name))) for name in chosen}

    def take_out(self, model: nn.Module) -> None:
        """Take PEFT's layers out, if there are any; the base is then what it was, bit by bit."""
        _take_out(model)

    def attach(self, model: nn.Module, artifact: Artifact) -> None:
        """Put a saved adapter in, frozen, as PEFT reads it.

        Raises:
            BaseMismatchError: if its tensors are not those of this model; no adapter is in the model then.
            MethodError: if PEFT can't, with its reason.
        """
        from peft.utils.save_and_load import set_peft_model_state_dict

        assert isinstance(artifact, PeftFolder)
        kind, given = artifact.meta.method, artifact.adapter
        _inject(model, kind, artifact.peft_config(), [], seed=0)
        tuner = getattr(model, INSIDE).tuner
        wanted = _shapes(_tensors(tuner))
        for name, shape in _shapes(given).items():
            if wanted.pop(name, None) != shape:
                _take_out(model)
                raise BaseMismatchError(
                    f"the '{kind}' adapter has {name} of size {shape}, for which PEFT has no place in this "
                    "model; use it with its own base or train it again on this one"
                )
        if wanted:
            _take_out(model)
            raise BaseMismatchError(
                f"the '{kind}' adapter has no {next(iter(wanted))}, which PEFT needs in this model; use it "
                "with its own base or train it again on this one"
            )
        with _quiet():
            set_peft_model_state_dict(_Root(tuner), given, ADAPTER)
        model.requires_grad_(False)

    def export(self, model: nn.Module, heads: Mapping[str, torch.Tensor], meta: ArtifactMeta) -> Artifact:
        """Copy PEFT's layers to the CPU: as factors if they have some, else as PEFT saves them."""
        inside: _Inside = getattr(model, INSIDE)
        kind = peft_method(meta.method)
        if not kind.exports_lora:
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(inside.tuner).items()}
            return PeftFolder.made(inside.tuner.peft_config[ADAPTER], tensors, heads, meta)
        read = FACTORS[kind.config_class]
        modules = {}
        for name, layer in layers_inside(model).items():
            factors, start = _copied(read(layer)), inside.start.get(name)
            modules[name] = _minus(factors, start) if start else factors
        return AdapterArtifact(modules=modules, heads=heads, meta=meta)


def _wrapped(model: nn.Module) -> dict[str, AdapterLinear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, AdapterLinear)}


def _inject(model: nn.Module, name: str, settings: Any, chosen: Sequence[str], seed: int) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = _wrapped(model)
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
    inside = _Inside(layers, [(parameter, parameter.data) for parameter in parameters])
    setattr(model, INSIDE, inside)
    for path, layer in layers.items():
        if getattr(settings, "init_lora_weights", None) == "olora" and path in chosen:
            # OLoRA writes into the storage; PiSSA gives the parameter another one.
            layer.weight.data = layer.weight.data.clone()
        _set(model, path, _plain(layer))
    try:
        with _quiet(), _seeded(derive_seed(seed, name)):
            inside.tuner = PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type](model, settings, ADAPTER)
            # PEFT's new modules are in training mode, in which PVeRA samples and others drop inputs.
            model.train(model.training)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError, KeyError) as error:
        _take_out(model)
        raise MethodError(
            f"PEFT can't put '{name}' into this model: {error}; change method.options or method.targets"
        ) from error
    left = [path for path in chosen if not isinstance(model.get_submodule(path), BaseTunerLayer)]
    if left or (chosen and not any(parameter.requires_grad for parameter in model.parameters())):
        _take_out(model)
        raise MethodError(
            f"PEFT's '{name}' trains nothing in layers like {(left or chosen)[0]}; choose others by "
            "method.targets, or another method"
        )


def _take_out(model: nn.Module) -> None:
    inside: _Inside | None = getattr(model, INSIDE, None)
    if inside is None:
        return
    delattr(model, INSIDE)
    for name, layer in inside.layers.items():
        _set(model, name, layer.train(model.training))
    for parameter, data in inside.storage:
        parameter.data = data
        parameter.requires_grad_(False)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _tensors(tuner: Any) -> dict[str, torch.Tensor]:
    from peft.utils.save_and_load import get_peft_model_state_dict

    with _quiet():
        return dict(
            get_peft_model_state_dict(_Root(tuner), adapter_name=ADAPTER, save_embedding_layers=False)
        )


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _lora(layer: Any) -> LoraFactors:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return LoraFactors(a.detach(), b.detach(), float(layer.scaling[ADAPTER]))


def _miss(layer: Any) -> LoraFactors:
    """Return MiSS as B = Mᵀ and an A that adds up inputs R apart: A[j, i] = 1 where i mod R = j."""
    block_RO = layer.miss_block[ADAPTER].detach()
    block_RO = block_RO.repeat(1, layer.out_features // block_RO.shape[1])
    rank = block_RO.shape[0]
    inputs = torch.arange(layer.in_features, device=block_RO.device)
    a = torch.zeros(rank, layer.in_features, dtype=block_RO.dtype, device=block_RO.device)
    a[inputs % rank, inputs] = 1
    return LoraFactors(a, block_RO.t(), 1.0)


def _vera(layer: Any) -> LoraFactors:
    """Return VeRA as diag(b)·B and diag(d)·A, in float32 so that no product is rounded to bfloat16."""
    b, d = (value[ADAPTER].detach().float() for value in (layer.vera_lambda_b, layer.vera_lambda_d))
    big_a, big_b = layer.vera_A[ADAPTER].float(), layer.vera_B[ADAPTER].float()
    rows, columns = layer.out_features, layer.in_features
    return LoraFactors(d[:, None] * big_a[:, :columns], b[:, None] * big_b[:rows], 1.0)


FACTORS: Mapping[str, Callable[[Any], LoraFactors]] = {
    "LoraConfig": _lora,
    "MissConfig": _miss,
    "VeraConfig": _vera,
}


def _minus(factors: LoraFactors, start: LoraFactors) -> LoraFactors:
    """Stack the factors and, negated, those that were taken out of the base: rank 2R, no sum is rounded."""
    a, b = torch.cat([factors.a, start.a]), torch.cat([factors.b, -start.b], 1)
    return LoraFactors(a, b, factors.scale)


def _copied(factors: LoraFactors) -> LoraFactors:
    a, b = (tensor.cpu().clone().contiguous() for tensor in (factors.a, factors.b))
    return LoraFactors(a, b, factors.scale)


def _plain(layer: AdapterLinear) -> nn.Module:
    """Return a plain layer with an `AdapterLinear`'s parameters."""
    if layer.quantised:
        return layer.quantised[0]
    plain: nn.Module
    with torch.device("meta"):
        if layer.transposed:
            from transformers.pytorch_utils import Conv1D

            plain = Conv1D(layer.out_features, layer.in_features)
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = layer.weight
    plain.bias = layer.bias  # type: ignore[assignment]
    return plain.train(layer.training)


def _set(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all global generators, and restore their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (PEFT draws from it)
    try:
        with torch.random.fork_rng():
            seed_everything(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress PEFT's warnings, which advise users who write PEFT's configuration by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

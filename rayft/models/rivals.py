"""Rivals: PEFT's own layers, put into a model by PEFT, and taken out again without a trace.

While a rival is in, each `AdapterLinear` is replaced by a plain layer of the same parameters, in which
PEFT hangs its own. When it goes, the `AdapterLinear`s come back, and with them the storage that their
parameters had: PiSSA and others put another weight into a parameter, which never reaches the base.

PEFT draws from torch's global state; it is seeded with the run's seed for that long, and put back. So
the same layers come out whatever ran before, though, unlike ours, not whatever else is adapted.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import BaseMismatchError, MethodError
from rayft.methods import method
from rayft.methods.base import AdapterLinear, LoraFactors, MethodConfig
from rayft.methods.rival import Rival
from rayft.models.heads import head_parameters
from rayft.models.peft_folder import PeftFolder
from rayft.models.targets import is_quantised, linear_shapes, linears
from rayft.numerics import derive_seed, seed_everything

__all__ = ["attach", "base_shapes", "dense", "export", "layers", "put_in", "take_out"]

INSIDE = "_rayft_rival"
"""Attribute of a model that has a rival in it."""
ADAPTER = "default"
"""PEFT's name for the one adapter."""
FROM_BASE = ("pissa", "olora")
"""Starts of PEFT that take factors out of the base's weight."""


@dataclass
class _Inside:
    """What comes back when PEFT's layers go, and what is needed to read them off."""

    layers: dict[str, AdapterLinear]
    storage: list[tuple[nn.Parameter, torch.Tensor]]
    tuner: Any = None
    """PEFT's model around ours (it registers ours, so ours must not register it)."""
    start: dict[str, LoraFactors] = field(default_factory=dict)
    """Of what started inside the base: module path → the factors at the start."""


class _Root(nn.Module):
    """The place of a `PeftModel`, whose names PEFT's files use, without what it does to its model."""

    def __init__(self, tuner: Any) -> None:
        super().__init__()
        self.base_model = tuner
        self.peft_config = tuner.peft_config


def base_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Give the linear layers' sizes as `linear_shapes` does, also while a rival is in the model."""
    inside: _Inside | None = getattr(model, INSIDE, None)
    if inside is None:
        return linear_shapes(model)
    return {name: (layer.out_features, layer.in_features) for name, layer in inside.layers.items()}


def put_in(model: nn.Module, config: MethodConfig, chosen: list[str], seed: int) -> tuple[str, ...]:
    """Have PEFT put a rival's fresh layers into the chosen ones; only they train then.

    Raises:
        MethodError: if PEFT can't, with its reason; the model is then as it was.
    """
    kind = method(config.name)
    assert isinstance(kind, Rival)
    shapes, layers = linear_shapes(model), linears(model)
    turned = {_stored_transposed(layers[name]) for name in chosen}
    if len(turned) > 1:
        raise MethodError(f"'{kind.name}' can't adapt Conv1D and Linear layers at once: choose by targets")
    settings = kind.peft_config(
        config, {name: shapes[name] for name in chosen}, seed, transposed=turned.pop()
    )
    from_base = str(getattr(settings, "init_lora_weights", "")).startswith(FROM_BASE)
    if from_base and any(is_quantised(layers[name]) for name in chosen):
        raise MethodError(
            f"'{kind.name}' starts from the base's weights, which are quantised: drop model.quantize, or use "
            "peft:LoRA"
        )
    _inject(model, kind.name, settings, chosen, seed)
    inside: _Inside = getattr(model, INSIDE)
    if from_base:
        inside.start = {name: _copied(_lora(model.get_submodule(name))) for name in chosen}
    return tuple(chosen)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Give PEFT's layers in a model that has a rival in it: module path → layer."""
    inside: _Inside = getattr(model, INSIDE)
    return {name: model.get_submodule(name) for name in inside.tuner.targeted_module_names}


def dense(layer: Any) -> torch.Tensor:
    """Give what a layer of PEFT says is its ΔW: as its weight is stored, mostly.

    What PEFT raises for classes that have no such thing is not caught.
    """
    if hasattr(layer, "miss_block"):
        # PEFT's own takes the weight, and gives both together.
        return _miss(layer).delta()
    return torch.as_tensor(layer.get_delta_weight(ADAPTER)).detach().to_dense()  # SHiRA's is sparse


def take_out(model: nn.Module) -> None:
    """Take PEFT's layers out, if there are any: every parameter of the base is bit for bit what it was."""
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


def export(model: nn.Module, meta: ArtifactMeta) -> AdapterArtifact | PeftFolder:
    """Read a rival off a model, copied to the CPU: as LoRA factors where it has some, else as PEFT does."""
    inside: _Inside = getattr(model, INSIDE)
    kind = method(meta.method)
    assert isinstance(kind, Rival)
    saved = {name: value.detach().cpu().clone() for name, value in head_parameters(model).items()}
    if not kind.exports_lora:
        return _folder(inside.tuner, saved, meta)
    read = FACTORS[kind.config_class]
    modules = {}
    for name in inside.tuner.targeted_module_names:
        factors = _copied(read(model.get_submodule(name)))
        start = inside.start.get(name)
        modules[name] = _minus(factors, start) if start else factors
    return AdapterArtifact(modules=modules, heads=saved, meta=meta)


def attach(model: nn.Module, folder: PeftFolder) -> None:
    """Put a saved rival in (frozen), as PEFT reads it; its heads are the caller's.

    Raises:
        BaseMismatchError: if its tensors are not those of this model; no adapter is in the model then.
        MethodError: if PEFT can't, with its reason.
    """
    from peft.utils.save_and_load import set_peft_model_state_dict

    settings, kind, given = folder.peft_config(), folder.meta.method, folder.adapter
    _inject(model, kind, settings, [], seed=0)
    tuner = getattr(model, INSIDE).tuner
    wanted = _shapes(_tensors(tuner))
    for name, shape in _shapes(given).items():
        if wanted.pop(name, None) != shape:
            take_out(model)
            raise BaseMismatchError(
                f"the '{kind}' adapter has {name} of size {shape}, which PEFT finds no place for in this "
                "model; use it with its own base or train it again on this one"
            )
    if wanted:
        take_out(model)
        raise BaseMismatchError(
            f"the '{kind}' adapter has no {next(iter(wanted))}, which PEFT wants in this model; use it with "
            "its own base or train it again on this one"
        )
    with _quiet():
        set_peft_model_state_dict(_Root(tuner), given, ADAPTER)
    model.requires_grad_(False)


def _inject(model: nn.Module, name: str, settings: Any, chosen: list[str], seed: int) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {path: layer for path, layer in linears(model).items() if isinstance(layer, AdapterLinear)}
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
    inside = _Inside(layers, [(parameter, parameter.data) for parameter in parameters])
    setattr(model, INSIDE, inside)
    for path, layer in layers.items():
        if getattr(settings, "init_lora_weights", None) == "olora" and path in chosen:
            # OLoRA writes into the storage itself; PiSSA gives the parameter another.
            layer.weight.data = layer.weight.data.clone()
        _set(model, path, _plain(layer))
    try:
        with _quiet(), _seeded(derive_seed(seed, name)):
            inside.tuner = PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type](model, settings, ADAPTER)
            # PEFT's new modules begin in training mode, where PVeRA samples and others drop.
            model.train(model.training)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError, KeyError) as error:
        take_out(model)
        raise MethodError(
            f"PEFT can't put '{name}' into this model: {error}; change method.options or method.targets"
        ) from error
    left = [path for path in chosen if not isinstance(model.get_submodule(path), BaseTunerLayer)]
    if left or (chosen and not any(parameter.requires_grad for parameter in model.parameters())):
        take_out(model)
        raise MethodError(
            f"PEFT's '{name}' trains nothing in layers like {(left or chosen)[0]}; choose others by "
            "method.targets, or another method"
        )


def _folder(tuner: Any, saved: Mapping[str, torch.Tensor], meta: ArtifactMeta) -> PeftFolder:
    copied = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(tuner).items()}
    return PeftFolder.made(tuner.peft_config[ADAPTER], copied, saved, meta)


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
    """Write MiSS as B = Mᵀ and A, which adds up the inputs R apart: A[j, i] = 1 where i mod R = j."""
    block_RO = layer.miss_block[ADAPTER].detach()
    block_RO = block_RO.repeat(1, layer.out_features // block_RO.shape[1])
    rank = block_RO.shape[0]
    inputs = torch.arange(layer.in_features, device=block_RO.device)
    a = torch.zeros(rank, layer.in_features, dtype=block_RO.dtype, device=block_RO.device)
    a[inputs % rank, inputs] = 1
    return LoraFactors(a, block_RO.t(), 1.0)


def _vera(layer: Any) -> LoraFactors:
    """Write VeRA as diag(b)·B and diag(d)·A, in float32: a product is not rounded to bfloat16."""
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


def _stored_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, AdapterLinear) and layer.transposed and not layer.quantised


def _plain(layer: AdapterLinear) -> nn.Module:
    """Make the layer that an `AdapterLinear` took the place of, around the same parameters."""
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
    """Seed all global generators, and put their states back."""
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
    """Keep PEFT's advice, meant for who writes its configuration by hand, to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

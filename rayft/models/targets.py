"""Which linear layers a method adapts."""

from __future__ import annotations

import re

from torch import nn

from rayft.config import nearest
from rayft.errors import ModelError, TargetError
from rayft.methods.base import AdapterLinear, LayerShape, MethodConfig, is_quantised
from rayft.models.methods import check_settings, method
from rayft.peft.layers import put_aside

__all__ = [
    "check",
    "check_bare",
    "check_pattern",
    "heads",
    "is_transposed",
    "linear_shapes",
    "linears",
    "select",
]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers that can be adapted: all but the output layer and classification heads.

    Linear layers are `nn.Linear`, quantised ones included, GPT-2's `Conv1D`, and `AdapterLinear`, which
    replaces either.
    """
    kinds = (nn.Linear, _conv1d(), AdapterLinear)
    outside = {id(module) for module in _outside(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and id(module) not in outside
    }


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the sizes of the linear layers that can be adapted: module path → (outputs, inputs).

    Where PEFT's layers are in the model, the sizes are those of the layers that they replace.
    """
    return {name: _shape(layer) for name, layer in (put_aside(model) or linears(model)).items()}


def check_bare(model: object) -> None:
    """Refuse what is no model without adapters.

    Raises:
        ModelError: saying what it is instead.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, nn.Module):
        raise ModelError(f"`model` is a {type(model).__name__}: pass a loaded model of transformers")
    kinds = (PeftModel, BaseTunerLayer, AdapterLinear)
    if any(isinstance(module, kinds) for module in model.modules()):
        raise ModelError(
            "`model` holds layers of an adapter already: pass a base that was just loaded, or what "
            "`PeftModel.unload()` returns"
        )


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return the classification heads, which train whole: path → module.

    These are a classifier's modules outside its base model (`score`, `classifier`, a pooler that is not
    the base's own). A language model has none, because its output layer belongs to the base.
    """
    output = getattr(model, "get_output_embeddings", None)
    if output is None or output() is not None:
        return {}
    prefix = getattr(model, "base_model_prefix", "")
    if not isinstance(getattr(model, prefix, None), nn.Module):
        return {}
    return {
        name: child
        for name, child in model.named_children()
        if name != prefix and next(child.parameters(), None) is not None
    }


def is_transposed(layer: nn.Module) -> bool:
    """Return whether a linear layer stores its weight as inputs × outputs, as GPT-2's `Conv1D` does."""
    return layer.transposed if isinstance(layer, AdapterLinear) else isinstance(layer, _conv1d())


def select(shapes: dict[str, tuple[int, int]], targets: str | tuple[str, ...]) -> list[str]:
    """Choose module paths: `all-linear`, a regular expression for whole paths, or last parts of names.

    Args:
        shapes: module path → (outputs, inputs).
        targets: as in `method.targets`.

    Raises:
        TargetError: if nothing matches, or a listed name is no linear layer, with the nearest name.
    """
    endings = sorted({name.rsplit(".", 1)[-1] for name in shapes})
    if targets == "all-linear":
        return list(shapes)
    if isinstance(targets, str):
        try:
            chosen = [name for name in shapes if re.fullmatch(targets, name)]
        except re.error as error:
            raise TargetError(f"targets '{targets}' is no regular expression ({error})") from error
        if not chosen:
            example = next(iter(shapes))
            raise TargetError(
                f"targets '{targets}' matches no linear layer; paths look like {example}, and the last "
                f"parts are {', '.join(endings)}"
            )
        return chosen
    for target in targets:
        if not any(_ends_with(name, target) for name in shapes):
            raise TargetError(f"no linear layer is called '{target}'{nearest(target, endings)}")
    return [name for name in shapes if any(_ends_with(name, target) for target in targets)]


def check(model: nn.Module, config: MethodConfig) -> list[str]:
    """Select the targets of a method in a model, and check that each can hold its rank.

    Raises:
        TargetError: as `select`; or if a rank or chain is above a layer's limit, or a rank pattern fits
            nothing.
        MethodError: if a setting would do nothing, or the method can't train on this base.
    """
    shapes = linear_shapes(model)
    if not shapes:
        raise TargetError(f"{type(model).__name__} has no linear layers that can be adapted")
    chosen = select(shapes, config.targets)
    kind = method(config.name)
    check_settings(config)
    layers = linears(model)
    kind.check_base(quantised=any(is_quantised(layers[name]) for name in chosen))
    for name in chosen:
        kind.check(LayerShape(*shapes[name]), config.of(name).rank, name, config.links)
    check_pattern(config, chosen)
    return chosen


def check_pattern(config: MethodConfig, chosen: list[str]) -> None:
    """Refuse a rank pattern that fits none of the chosen modules.

    Raises:
        TargetError: naming the pattern, with the nearest last part of a name.
    """
    for pattern in config.rank_pattern:
        alone = config.model_copy(update={"rank_pattern": {pattern: config.rank + 1}})
        if all(alone.of(name).rank == config.rank for name in chosen):
            endings = sorted({name.rsplit(".", 1)[-1] for name in chosen})
            raise TargetError(f"rank_pattern '{pattern}' fits no adapted module{nearest(pattern, endings)}")


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _outside(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are no targets: the output layer and the heads, with all modules in them."""
    tops = [*heads(model).values(), getattr(model, "lm_head", None)]
    output = getattr(model, "get_output_embeddings", None)
    if output is not None:
        tops.append(output())
    return [inner for top in tops if isinstance(top, nn.Module) for inner in top.modules()]


def _shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, _conv1d()):
        inputs, outputs = layer.weight.shape  # type: ignore[misc]
        return int(outputs), int(inputs)
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D

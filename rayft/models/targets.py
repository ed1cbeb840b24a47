"""Which linear layers a method adapts."""

from __future__ import annotations

import re

from torch import nn

from rayft.config import nearest
from rayft.errors import TargetError
from rayft.methods import method
from rayft.methods.base import AdapterLinear, LayerShape, MethodConfig

__all__ = ["check", "check_pattern", "heads", "is_quantised", "linear_shapes", "linears", "select"]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Find the linear layers that can be adapted: all but the output layer and classification heads.

    Linear layers are `nn.Linear` (quantised ones among them), GPT-2's `Conv1D`, and those that an
    `AdapterLinear` took over.
    """
    kinds = (nn.Linear, _conv1d(), AdapterLinear)
    outside = {id(module) for module in _outside(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and id(module) not in outside
    }


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Give the adaptable linear layers' sizes: module path → (outputs, inputs)."""
    return {name: _shape(layer) for name, layer in linears(model).items()}


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """Find the classification heads, which train whole: path → module.

    They are what a classifier has beside its base model (`score`, `classifier`, a pooler that is not
    the base's own). A language model has none: its output layer is the base's.
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


def is_quantised(layer: nn.Module) -> bool:
    """Whether a linear layer holds its weight quantised."""
    if isinstance(layer, AdapterLinear):
        return bool(layer.quantised)
    return type(layer).__module__.startswith("bitsandbytes")


def select(shapes: dict[str, tuple[int, int]], targets: str | tuple[str, ...]) -> list[str]:
    """Choose module paths: `all-linear`, one regular expression (whole path), or last name parts.

    Raises:
        TargetError: if nothing matches, or a listed name is no linear layer; with the nearest one.
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
    """Select the targets of a method in a model and check that each can hold its rank.

    Raises:
        TargetError: as `select`, for a rank or chain above a layer's limit, and for a rank pattern
            that fits nothing.
        MethodError: for settings that would do nothing, and a base that the method can't train.
    """
    shapes = linear_shapes(model)
    if not shapes:
        raise TargetError(f"{type(model).__name__} has no linear layers that can be adapted")
    chosen = select(shapes, config.targets)
    kind = method(config.name)
    kind.check_settings(config)
    layers = linears(model)
    kind.check_base(quantised=any(is_quantised(layers[name]) for name in chosen))
    for name in chosen:
        kind.check(LayerShape(*shapes[name]), config.of(name).rank, name, config.links)
    check_pattern(config, chosen)
    return chosen


def check_pattern(config: MethodConfig, chosen: list[str]) -> None:
    """Refuse a rank pattern that fits none of the chosen modules.

    Raises:
        TargetError: naming it, with the nearest last name part.
    """
    for pattern in config.rank_pattern:
        alone = config.model_copy(update={"rank_pattern": {pattern: config.rank + 1}})
        if all(alone.of(name).rank == config.rank for name in chosen):
            endings = sorted({name.rsplit(".", 1)[-1] for name in chosen})
            raise TargetError(f"rank_pattern '{pattern}' fits no adapted module{nearest(pattern, endings)}")


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _outside(model: nn.Module) -> list[nn.Module]:
    """List the modules that are no targets: output layer and heads, with all that is in them."""
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

"""Which linear layers a method adapts."""

from __future__ import annotations

import re

from torch import nn

from rayft.config import nearest
from rayft.errors import TargetError
from rayft.methods import method
from rayft.methods.base import AdapterLinear, LayerShape, MethodConfig

__all__ = ["check", "linear_shapes", "linears", "select"]


def linears(model: nn.Module) -> dict[str, nn.Linear | AdapterLinear]:
    """Find the linear layers that can be adapted: all but the output layer and classification heads."""
    outside = {id(module) for module in _heads(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | AdapterLinear) and id(module) not in outside
    }


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Give the adaptable linear layers' sizes: module path → (outputs, inputs)."""
    return {name: (layer.out_features, layer.in_features) for name, layer in linears(model).items()}


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
        TargetError: as `select`, and for a rank above a layer's limit.
    """
    shapes = linear_shapes(model)
    if not shapes:
        raise TargetError(f"{type(model).__name__} has no linear layers that can be adapted")
    chosen = select(shapes, config.targets)
    for name in chosen:
        method(config.name).check(LayerShape(*shapes[name]), config.rank, name)
    return chosen


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _heads(model: nn.Module) -> list[nn.Module]:
    heads = [getattr(model, name, None) for name in ("lm_head", "score", "classifier")]
    output_layer = getattr(model, "get_output_embeddings", None)
    if output_layer is not None:
        heads.append(output_layer())
    found: list[nn.Module] = []
    for head in heads:
        if isinstance(head, nn.Module):
            found.extend(head.modules())
    return found

"""The small operations between a decoder's products, each in one pass over memory.

Semantics:
    normalise(x)         x.float() · rsqrt(mean(x.float()²) + eps)
    rms_norm(x, w, eps, kind)
                         w · normalise(x).to(x.dtype)          kind = rounded: Llama, Mistral, Qwen
                         (w · normalise(x)).to(x.dtype)        kind = wide: OLMo 2
                         (normalise(x) · (1 + w)).to(x.dtype)  kind = shifted: Gemma
    add_rms_norm(x, r, w, eps, kind)   s = x + r;  s, rms_norm(s, w, eps, kind)
    gated(g, u, act)     act(g) · u                            act = silu, or gelu (with tanh)
    rotate(q, k, cos, sin)   q · cos + half(q) · sin, and so for k;  half([a, b]) = [−b, a]

Each function computes just that. On GPUs it runs compiled (`torch.compile`), forward and backward: the frozen
base of 1 B parameters took 0.72 times as long on an H200 with 16×512 tokens, and 0.53 times with 135 M
parameters and 4×512 tokens, the latter with the fused loss (`linear_cross_entropy`). Compiled functions round
less often than the single operations do, and can be differentiated once only. Their speed is measured by
`benchmarks/bench_train_step.py`.

Shapes: N tokens (all axes but the last ones, flattened), D numbers, H heads, G heads of keys. N may change
from call to call without another compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch.nn import functional

__all__ = ["Activation", "Norm", "add_rms_norm", "gated", "rms_norm", "rotate", "run"]

Norm = Literal["rounded", "wide", "shifted"]
"""Kinds of RMSNorm, by how the weight is applied."""
Activation = Literal["silu", "gelu"]

VARIANTS = 64
"""Compilations of one function in a process: one for each width, dtype and need of gradients."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: Norm) -> torch.Tensor:
    """Normalise by the root of the mean square: x (…, D), weight (D,) → (…, D) in x's dtype."""
    return run(_rms_norm, _rows(x), weight, eps, kind).view(x.shape)  # type: ignore[no-any-return]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + residual (…, D), and that normalised."""
    total, normed = run(_add_rms_norm, _rows(x), _rows(residual), weight, eps, kind)
    return total.view(x.shape), normed.view(x.shape)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return act(gate) · up: (…, D)."""
    return run(_gated, _rows(gate), _rows(up), activation).view(gate.shape)  # type: ignore[no-any-return]


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn pairs of numbers by each token's angles.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D).
        cos: (B or 1, T, D).
        sin: (B or 1, T, D).
    """
    rows, _, width, size = query.shape
    angles = [one.expand(rows, width, size).reshape(-1, size) for one in (cos, sin)]
    # (N, H, D): a view of what the projections return.
    heads = [one.transpose(1, 2).reshape(rows * width, -1, size) for one in (query, key)]
    turned = run(_rotate, *heads, *angles)
    q, k = (one.view(rows, width, -1, size).transpose(1, 2) for one in turned)
    return q, k


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of tensors (N, …), compiled if they are on a GPU; N may be any number."""
    if not compiles(arguments[0]):
        return function(*arguments)
    for argument in arguments:
        # Weights have one axis.
        if isinstance(argument, torch.Tensor) and argument.ndim > 1:
            torch._dynamo.maybe_mark_dynamic(argument, 0)
    return compiled(function)(*arguments)


def compiles(tensor: torch.Tensor) -> bool:
    """Return whether functions of a tensor run compiled."""
    return tensor.is_cuda


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled form of a function, which is compiled when it is first called."""
    import torch._dynamo as dynamo

    # By default 8, and a process may load one base after the other. Past the limit a function runs as it is.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, VARIANTS)
    return torch.compile(function, dynamic=False)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: Norm) -> torch.Tensor:
    assert kind in get_args(Norm)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if kind == "rounded":
        return weight * wide.to(x.dtype)
    if kind == "wide":
        return (weight * wide).to(x.dtype)
    return (wide * (1.0 + weight.float())).to(x.dtype)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: Norm) -> torch.Tensor:
    return _normalised(x, weight, eps, kind)


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    total = residual + x
    return total, _normalised(total, weight, eps, kind)


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh") * up


def _rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # Some models have angles in float32.
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = (one * cos + _half(one) * sin for one in (query, key))
    q, k = (one.to(query.dtype) for one in turned)
    return q, k


def _half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)

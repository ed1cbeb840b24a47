"""Let a base compute the small operations between its products fused (`rayft.kernels.fused`).

A fused module has another class: a subclass of its own with another `forward`. Parameters, names and
children stay, so copies of the model, adapters, CUDA graphs and checkpointing work as before. So do hooks:
where a fused operation would not call a child that has one, the module computes as its own class does. A
pickle holds the plain modules, since another process has not tried the fused ones.

Which modules are fused is decided by what they compute. Of each module whose parts have the usual names, a
small copy with random weights and simple children is run in bfloat16, once by each class. If the results are
equal to the last bit, the module is fused. Everything else stays as it is.

- RMSNorm, in three kinds; Gemma's multiplies by 1 + w.
- A feed-forward block: down(act(gate(x)) · up(x)), with SiLU or GELU (tanh).
- Attention that calls `apply_rotary_pos_emb` of its module: a copy of its `forward` finds another function by
  this name. transformers' own function is not replaced, and other models call it.
- A decoder layer that normalises before attention and before the feed-forward block: the first addition and
  the second norm are one operation.
- The output layer, if the model returns its product as it is: the loss then needs no whole logits.

ZeRO-3 gathers a module's weights when the module is called. A fused layer reads a norm's weight without
calling the norm, so the base must be whole.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, ClassVar, Self, get_args

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from rayft.kernels.fused import Activation, Norm, add_rms_norm, gated, rms_norm, rotate

__all__ = ["Fused", "FusedHead", "fuse", "is_called", "is_fused", "plainly", "unfuse"]

ROTARY = "apply_rotary_pos_emb"
PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where torch keeps the hooks of a module that run when it is called."""
EPSILONS = ("variance_epsilon", "eps")
WIDTH = 8
"""Numbers of a token in the small copies whose size is free."""
TOKENS = 256
"""Tokens that small copies compute: enough for two forms of GELU to differ."""


class Fused(nn.Module):
    """A mixin of fused modules; `plain` is the class that the module had."""

    plain: ClassVar[type[nn.Module]]
    piece: ClassVar[str]
    """What is fused, for people."""

    def fused(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Compute what the plain class does, by fused operations and whatever hooks there are."""
        raise NotImplementedError

    def __copy__(self) -> Self:
        copied: Any = object.__new__(type(self))
        copied.__setstate__(self.__dict__.copy())
        return copied  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied: Any = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return object.__new__, (self.plain,), *state


class FusedNorm(Fused):
    """RMSNorm."""

    piece = "norms"
    kind: ClassVar[Norm]
    epsilon: ClassVar[str]
    """Name of the attribute with eps."""

    weight: nn.Parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (…, D)."""
        return rms_norm(x, self.weight, getattr(self, self.epsilon), self.kind)

    fused = forward

    def after_adding(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + residual, and that normalised."""
        return add_rms_norm(x, residual, self.weight, getattr(self, self.epsilon), self.kind)


class FusedMlp(Fused):
    """A gated feed-forward block."""

    piece = "feed-forward blocks"
    activation: ClassVar[Activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (…, D) → (…, D)."""
        if any(is_called(child) for name, child in self._modules.items() if name not in PROJECTIONS):
            return super().forward(x)  # type: ignore[no-any-return]
        return self.fused(x)

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """As `Fused.fused`."""
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.activation))  # type: ignore[operator,no-any-return]


class FusedAttention(Fused):
    """Attention with fused rotary embeddings; its class has a `forward` that was made for it."""

    piece = "rotary embeddings"


class FusedLayer(Fused):
    """A decoder layer with norms before attention and before the feed-forward block."""

    piece = "layers"

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Compute (B, T, D) → (B, T, D)."""
        norm = self.post_attention_layernorm
        # Some PEFT methods put a module of their own in the norm's place.
        if arguments or not isinstance(norm, FusedNorm) or is_called(norm):
            return super().forward(hidden_states, *arguments, **options)  # type: ignore[no-any-return]
        return self.fused(hidden_states, **options)

    def fused(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        """As `Fused.fused`."""
        norm: Any = self.post_attention_layernorm
        attended, *_ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)  # type: ignore[operator]
        hidden_states, normed = norm.after_adding(attended, hidden_states)
        return hidden_states + self.mlp(normed)  # type: ignore[operator,no-any-return]


class FusedHead(Fused):
    """An output layer without bias whose product a model returns as it is; the loss computes it."""

    piece = "the loss"


def fuse(model: nn.Module) -> dict[str, int]:
    """Fuse what is known in a model, whose parameters must be whole; what is fused stays fused.

    Returns:
        What is fused now → how many of it; empty if nothing is known.
    """
    for module in model.modules():
        if not isinstance(module, Fused) and "forward" not in module.__dict__:
            _fuse_part(module)
    for module in model.modules():
        # After their parts.
        if not isinstance(module, Fused) and {*module._modules} == LAYER and "forward" not in module.__dict__:
            _fuse_layer(module)
    _fuse_head(model)
    return dict(Counter(module.piece for module in model.modules() if isinstance(module, Fused)))


def unfuse(model: nn.Module) -> None:
    """Restore the classes that all modules had before `fuse`."""
    for module in model.modules():
        if isinstance(module, Fused):
            kind: Any = type(module)
            module.__class__ = kind.plain


def is_called(module: nn.Module | None) -> bool:
    """Return whether a module has to be called, because it has hooks or a `forward` of its own."""
    if module is None:
        return False
    own = "forward" in module.__dict__ or any(getattr(module, name) for name in HOOKS)
    return own or torch_module._has_any_global_hook()


def is_fused(model: nn.Module) -> bool:
    """Return whether anything in a model is fused."""
    return any(isinstance(module, Fused) for module in model.modules())


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Compute without fused modules in the block, for example to differentiate twice."""
    fused = {module: type(module) for module in model.modules() if isinstance(module, Fused)}
    unfuse(model)
    try:
        yield
    finally:
        for module, kind in fused.items():
            module.__class__ = kind


@cache
def _class(mixin: Any, plain: Any, **members: Any) -> type[Fused]:
    """Return a mixin's subclass of a class, the same one whenever it is asked for."""
    return type(f"Fused{plain.__name__}", (mixin, plain), {"plain": plain, **members})


# --- what is known


def _fuse_part(module: nn.Module) -> None:
    """Fuse a norm, a feed-forward block or attention, if it is known."""
    plain: Any = type(module)
    parameters, children = module._parameters, module._modules
    weight = parameters.get("weight")
    if (
        {*parameters} == {"weight"}
        and not children
        and weight is not None
        and weight.ndim == 1
        and len(inspect.signature(plain.forward).parameters) == len(["self", "x"])
    ):
        names = [name for name in EPSILONS if isinstance(getattr(module, name, None), float)]
        norms = [_class(FusedNorm, plain, kind=kind, epsilon=names[0]) for kind in get_args(Norm) if names]
        # Of several sizes, so that eps matters.
        sizes = 10.0 ** -torch.arange(TOKENS).remainder(5).unsqueeze(1)
        x = (_random(TOKENS, len(weight)) * sizes).bfloat16()
        _swap(module, norms, _copy(module, _parameters={"weight": _parameter(len(weight))}), x)
    elif not parameters and {*children} >= PROJECTIONS and len(children) <= len(PROJECTIONS) + 1:
        blocks = [_class(FusedMlp, plain, activation=kind) for kind in get_args(Activation)]
        others = {name: child and _copy(child) for name, child in children.items() if name not in PROJECTIONS}
        if any("forward" in child.__dict__ for child in others.values() if child is not None):
            return
        simple: dict[str, Any] = {**others, **{name: _linear() for name in PROJECTIONS}}
        # Of several sizes, since some blocks bound what they multiply.
        sizes = 10.0 ** torch.arange(TOKENS).remainder(4).unsqueeze(1)
        _swap(module, blocks, _copy(module, _modules=simple), (_random(TOKENS, WIDTH) * sizes).bfloat16())
    elif (attention := _with_rotation(plain)) is not None:
        module.__class__ = attention


def _fuse_layer(module: nn.Module) -> None:
    """Fuse a decoder layer of fused parts, if it is known."""
    parts = module._modules
    first, second = parts["input_layernorm"], parts["post_attention_layernorm"]
    if not (
        isinstance(first, FusedNorm) and isinstance(second, FusedNorm) and isinstance(parts["mlp"], FusedMlp)
    ):
        return
    width = len(first.weight)
    given = {name: _random(2, 3, width) for name in ("attention_mask", "position_embeddings", "position_ids")}
    simple = {
        "input_layernorm": _copy(first, _parameters={"weight": _parameter(width)}),
        "self_attn": _Attention(given),
        "post_attention_layernorm": _copy(second, _parameters={"weight": _parameter(width)}),
        "mlp": _Mlp(),
    }
    plain: Any = type(module)
    _swap(module, [_class(FusedLayer, plain)], _copy(module, _modules=simple), _random(2, 3, width), **given)


def _fuse_head(model: Any) -> None:
    """Fuse the output layer of a language model, if its product is what the model returns as logits."""
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if find is not None else None
    plain: Any = type(head)
    if isinstance(head, Fused) or getattr(plain, "forward", None) is not nn.Linear.forward:
        return
    base = getattr(model, "base_model_prefix", "")
    name = next((name for name, child in model._modules.items() if child is head), None)
    own = any("forward" in one.__dict__ for one in (head, model))
    if own or head.bias is not None or name is None or base not in model._modules:
        return
    stub = _Head()
    copied = _copy(model, _modules={**model._modules, base: _Base(), name: stub})
    ids = torch.zeros(2, 3, dtype=torch.int64)
    try:
        with torch.no_grad():
            fits = type(model).forward(copied, input_ids=ids, use_cache=False).logits is stub.returned
    except Exception:  # noqa: BLE001  (a model of an unknown kind may need anything)
        return
    if fits:
        head.__class__ = _class(FusedHead, plain)


def _swap(
    module: nn.Module, candidates: list[type[Fused]], copied: nn.Module, x: torch.Tensor, **options: Any
) -> None:
    """Set the first class by which a copy of a module computes what the module's own class does."""
    expected = _computed(type(module).forward, copied, x, options)
    if not expected:
        return
    for candidate in candidates:
        copied.__class__ = candidate
        found = _computed(candidate.fused, copied, x, options)
        if found and all(map(torch.equal, found, expected)):
            module.__class__ = candidate
            return


def _computed(
    forward: Callable[..., Any], module: nn.Module, x: torch.Tensor, options: Mapping[str, Any]
) -> list[torch.Tensor]:
    """Return what a module computes in evaluation and in training, where some drop values; or nothing."""
    found = []
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            for training in (False, True):
                torch.manual_seed(0)
                module.training = training
                found.append(forward(module, x, **options))
    except Exception:  # noqa: BLE001  (a module of an unknown kind may need anything)
        return []
    finally:
        module.training = False
    return found if all(isinstance(one, torch.Tensor) for one in found) else []


@cache
def _with_rotation(plain: Any) -> type[Fused] | None:
    """Return a class of attention that rotates fused; None if the class's rotation is not the usual one."""
    written = inspect.unwrap(plain.forward)
    if not isinstance(written, FunctionType) or ROTARY not in written.__code__.co_names:
        return None
    own = written.__globals__.get(ROTARY)
    if own is None or not _rotates(own):
        return None

    def rotation(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Some models turn a part of each head only.
        if others or options or cos.ndim != 3 or cos.shape[-1] != q.shape[-1]:
            return own(q, k, cos, sin, *others, **options)  # type: ignore[no-any-return]
        return rotate(q, k, cos, sin)

    forward = FunctionType(
        written.__code__,
        {**written.__globals__, ROTARY: rotation},
        written.__name__,
        written.__defaults__,
        written.__closure__,
    )
    forward.__kwdefaults__ = written.__kwdefaults__
    return _class(FusedAttention, plain, forward=forward)


def _rotates(function: Callable[..., Any]) -> bool:
    """Return whether a function of transformers turns queries and keys as `rotate` does."""
    given = [_random(2, heads, 3, WIDTH) for heads in (4, 2)] + [_random(2, 3, WIDTH) for _ in range(2)]
    try:
        found = function(*given)
        return all(torch.equal(one, other) for one, other in zip(found, rotate(*given), strict=True))
    except Exception:  # noqa: BLE001  (a function of another model may need anything)
        return False


# --- small copies


class _Attention(nn.Module):
    """Attention that checks what it is given, and computes something simple."""

    def __init__(self, given: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._given = given

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        """Return sin(x).

        Raises:
            ValueError: if the options are not those that the layer was given.
        """
        options = {name: one for name, one in options.items() if one is not None and one is not False}
        if {*options} != {*self._given} or any(options[name] is not self._given[name] for name in options):
            raise ValueError("the layer changes the options of its attention")
        return hidden_states.sin(), None


class _Mlp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()


class _Base(nn.Module):
    """A model without its output layer."""

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=_random(2, 3, WIDTH))


class _Head(nn.Module):
    """An output layer that keeps what it returned."""

    returned: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.returned = x.sin()
        return self.returned


def _copy(module: nn.Module, **parts: Mapping[str, Any]) -> nn.Module:
    """Return a copy of a module on the CPU with other parameters or children, in evaluation mode."""
    copied = copy.copy(module)
    # Hooks may expect the real parts.
    hooks = {name: OrderedDict[int, Any]() for name in module.__dict__ if name.endswith("_hooks")}
    copied.__dict__.update(hooks, training=False, **{name: dict(part) for name, part in parts.items()})
    return copied


def _linear() -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
    layer.weight = _parameter(WIDTH, WIDTH)
    return layer


def _parameter(*size: int) -> nn.Parameter:
    return nn.Parameter(_random(*size), requires_grad=False)


def _random(*size: int) -> torch.Tensor:
    """Return random numbers in bfloat16, in which another order of operations shows."""
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator, device="cpu").bfloat16()

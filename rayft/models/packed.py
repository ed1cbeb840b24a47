"""Several adapters in one model at the same time: each slot's adapter acts on the slot's own rows of a batch.

The rows of a batch are sorted by slot. A layer computes its base for all rows in one product and adds each
slot's terms to the slot's rows. Each slot also has a model of its own, a `skeleton` of the base that shares
its weights; the slot's adapters hang there too, so whatever works on a model with adapters works on a slot.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from rayft.artifacts import AdapterArtifact
from rayft.errors import MethodError
from rayft.kernels.grouped_linear import Plan, Term, grouped_linear
from rayft.methods.base import Adapter, AdapterLinear, LoraFactors
from rayft.models.fuse import Fused
from rayft.models.inject import attach, clear
from rayft.models.targets import linears

__all__ = ["Layout", "attached", "pack", "skeleton", "spans_of", "unpackable"]

OwnerT = TypeVar("OwnerT")
PLANS = 16
"""Most plans that a layer keeps, of training and of the rest each: widths differ from batch to batch."""

CONTAINERS = frozenset({dict, list, set, OrderedDict})
CONSTANTS = frozenset({bool, int, float, str, type(None), torch.dtype})
COPYING = (
    "__deepcopy__", "__getnewargs__", "__getnewargs_ex__", "__getstate__", "__new__", "__reduce__",
    "__reduce_ex__", "__setstate__", "__slots__",
)  # fmt: skip
"""What a class may have that decides how it is copied."""


@dataclass
class Layout:
    """Which rows of the current batch belong to which slot; all layers of a packed model read it."""

    spans: dict[int, slice] = field(default_factory=dict)
    """Slot → its tokens, counted through all rows; slots that are not in the batch are missing."""
    width: int = 0
    """Tokens of a row."""
    widths: dict[int, int] = field(default_factory=dict)
    """Slot → tokens of its rows in a batch of its own; those beyond are padding."""
    random: dict[int, Any] = field(default_factory=dict)
    """Slot → random state from which its dropout draws."""

    def enter(self, slots: Sequence[int], width: int) -> None:
        """Describe the next pass.

        Args:
            slots: the slot of each row, sorted.
            width: tokens of a row.
        """
        self.width, self.spans = width, spans_of(slots, width)
        self.widths = dict.fromkeys(self.spans, width)

    @property
    def key(self) -> tuple[tuple[int, int, int], ...]:
        """The spans, in a form that can be compared."""
        return tuple((slot, span.start, span.stop) for slot, span in self.spans.items())


class PackedAdapter(Adapter):
    """The slots' adapters of one layer.

    Args:
        adapters: slot → its adapter in this layer, in the order of their rows.
        layout: says which rows belong to a slot.
    """

    def __init__(self, adapters: Mapping[int, Adapter], layout: Layout) -> None:
        super().__init__()
        # Registered, so that what captures the model's passes finds their parameters.
        self.adapters = nn.ModuleDict({str(slot): adapter for slot, adapter in adapters.items()})
        self._layout = layout
        self._plans: dict[bool, dict[object, tuple[Plan, list[int]]]] = {True: {}, False: {}}
        """Whether it trains → division of the rows → the plan of slots with terms and without dropout, and
        the other slots; the one that was used last is the last. A captured graph needs the plan of training,
        which has one division then, whatever is validated."""

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the base for all rows, and each slot's terms for its own."""
        if weight is None:
            return self._updates(x, self._present)
        if len(self._layout.spans) == 1 and (present := self._present) and not self._dropout(present[0]):
            # All rows are the slot's, so its adapter computes them as it does alone.
            return self.adapters[str(present[0])](x, weight, bias)  # type: ignore[no-any-return]
        plan, apart = self._planned()
        y = grouped_linear(x, weight, bias, plan)
        return y + self._updates(x, apart) if apart else y

    def to_lora(self) -> LoraFactors:
        """Raise MethodError: the slots' own adapters have factors."""
        raise MethodError("a packed layer has the adapters of several slots")

    @property
    def _present(self) -> list[int]:
        """The slots that adapt this layer and are in the batch."""
        return [slot for slot in self._layout.spans if str(slot) in self.adapters]

    def _dropout(self, slot: int) -> float:
        return self.adapters[str(slot)].dropout if self.training else 0.0  # type: ignore[return-value]

    def _planned(self) -> tuple[Plan, list[int]]:
        """Return the plan of the current rows, made at its first use, and the slots that it leaves out."""
        key, plans = self._layout.key, self._plans[self.training]
        found = plans.pop(key, None)
        if found is None:
            terms: list[Term] = []
            apart: list[int] = []
            for slot in self._present:
                adapter, span = self.adapters[str(slot)], self._layout.spans[slot]
                own = None if self._dropout(slot) else adapter.terms(span)  # type: ignore[operator]
                if own is None:
                    apart.append(slot)
                else:
                    terms += own
            found = Plan(terms), apart
        plans[key] = found
        if len(plans) > PLANS:
            del plans[next(iter(plans))]
        return found

    def _updates(self, x: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """Compute what some slots add, term by term, and zeros for all other rows: x (…, I) → (…, O)."""
        x_NI = x.reshape(-1, x.shape[-1])
        parts, end = [], 0
        for slot in slots:
            span, adapter, layout = self._layout.spans[slot], self.adapters[str(slot)], self._layout
            dropout = self._dropout(slot)
            # For dropout, as many numbers are drawn as in a batch of the slot's own. Without it, all columns
            # are computed, so that a captured graph fits batches of every width.
            width = layout.widths[slot] if dropout else layout.width
            own = x_NI[span].view(-1, layout.width, x_NI.shape[1])[:, :width]
            with self._drawing(slot, x.device):
                update = adapter.update(own, dropout)  # type: ignore[operator]
            update = functional.pad(update, (0, 0, 0, layout.width - own.shape[1])).flatten(0, 1)
            if end < span.start:
                parts.append(update.new_zeros(span.start - end, update.shape[1]))
            parts.append(update)
            end = span.stop
        if end < len(x_NI):
            parts.append(parts[-1].new_zeros(len(x_NI) - end, parts[-1].shape[1]))
        y = torch.cat(parts)
        return y.view(*x.shape[:-1], y.shape[1])

    @contextmanager
    def _drawing(self, slot: int, device: torch.device) -> Iterator[None]:
        """Let dropout draw from the slot's own random state in the block."""
        if not self._dropout(slot):
            yield
            return
        of: Any = torch.cuda if device.type == "cuda" else torch.random
        outside = of.get_rng_state()
        of.set_rng_state(self._layout.random[slot])
        try:
            yield
        finally:
            self._layout.random[slot] = of.get_rng_state()
            of.set_rng_state(outside)


def spans_of(owners: Sequence[OwnerT], width: int) -> dict[OwnerT, slice]:
    """Return the tokens of each owner of rows, counted through all rows.

    Args:
        owners: the owner of each row; those of one owner follow one another.
        width: tokens of a row.
    """
    spans, first = {}, 0
    for owner, rows in groupby(owners):
        last = first + len([*rows])
        spans[owner] = slice(first * width, last * width)
        first = last
    return spans


def skeleton(model: nn.Module) -> Any:
    """Return a copy of a model's modules that shares all its parameters and buffers."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # `deepcopy` alone takes six times as long, most of it for empty containers of hooks.
    plain = []
    for module in model.modules():
        kind: Any = type(module)
        if _copies_plainly(kind):
            plain.append(module)
            memo[id(module)] = object.__new__(kind)
    for module in plain:
        state = memo[id(module)].__dict__
        for name, value in module.__dict__.items():
            if type(value) in CONTAINERS and not value:
                # The handles of hooks refer to it too.
                state[name] = memo.setdefault(id(value), type(value)())
            else:
                state[name] = value if type(value) in CONSTANTS else copy.deepcopy(value, memo)
    return copy.deepcopy(model, memo)


@cache
def _copies_plainly(kind: Any) -> bool:
    """Return whether a copy of a module needs nothing but a copy of its dictionary."""
    kind = kind.plain if issubclass(kind, Fused) else kind
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in COPYING)


def attached(model: nn.Module, artifact: AdapterArtifact) -> Any:
    """Return a skeleton of a base without adapters, with a saved adapter in it.

    Raises:
        BaseMismatchError: as `attach`.
    """
    own = skeleton(model)
    attach(own, artifact)
    return own


def unpackable(model: nn.Module) -> str:
    """Return why no trials can share a batch on a base, as a clause; empty if they can."""
    dropped = next(
        (name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p), None
    )
    if dropped is not None:
        return f"the base drops values itself ({dropped}), at random over the whole batch"
    if any(isinstance(module, AdapterLinear) and module.quantised for module in model.modules()):
        return "the base is quantised"
    # Attention and some blocks drop values by a function, with a setting of their own.
    settings: dict[str, Any] = model.config.get_text_config().to_dict()  # type: ignore[union-attr,operator]
    for name, value in settings.items():
        random = "drop" in name or "jitter" in name
        if random and isinstance(value, float) and value and not name.startswith(("classifier", "summary")):
            return f"the base draws random numbers ({name}: {value:g}) for the whole batch"
    return ""


def pack(model: nn.Module, slots: Mapping[int, nn.Module], layout: Layout) -> None:
    """Put the adapters of slots into a model, in place of what it has.

    Args:
        model: the base, whose linear layers are wrapped.
        slots: slot → its skeleton, with its adapters, in the order of their rows.
        layout: says which rows belong to a slot.
    """
    clear(model)
    found: dict[str, dict[int, Adapter]] = {}
    for slot, own in slots.items():
        for name, layer in linears(own).items():
            if isinstance(layer, AdapterLinear) and layer.adapter is not None:
                found.setdefault(name, {})[slot] = layer.adapter
    for name, adapters in found.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, AdapterLinear)
        layer.adapter = PackedAdapter(adapters, layout).train(layer.training)

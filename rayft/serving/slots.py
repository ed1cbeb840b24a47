"""One model in memory, many adapters in it: each linear holds a table slot → factors.

A slot is a number that stands for an adapter in a forward; 0 is the base. Before a forward
the engine says which slot each of its tokens belongs to (`Slots.assign`); the linears then add
each token's own adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

import torch
from torch import nn
from torch.nn import functional

from rayft.kernels.segment_lora import BASE_SLOT, Segment, SlotFactors, segment_lora, segments
from rayft.methods.base import LoraFactors
from rayft.models.targets import linears

__all__ = ["MultiAdapterLinear", "Slots"]


class _Batch:
    """The tokens of the forward that runs now; all linears of a model read the same one."""

    def __init__(self) -> None:
        self.tokens = 0
        self.segments: tuple[Segment, ...] = ()


class MultiAdapterLinear(nn.Module):
    """A linear layer whose tokens may belong to different adapters.

    It takes over the parameters of the linear that it replaces under the same names.
    """

    def __init__(self, linear: nn.Linear, batch: _Batch) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.table: dict[int, SlotFactors] = {}
        self._batch = batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (…, I) → (…, O), the leading dimensions being the tokens that were assigned."""
        y = functional.linear(x, self.weight, self.bias)
        if self._batch.segments:
            x_NI, y_NO = x.reshape(-1, self.in_features), y.view(-1, self.out_features)
            assert len(x_NI) == self._batch.tokens, "the slots were assigned for another batch"
            segment_lora(x_NI, y_NO, self._batch.segments, self.table)
        return y


class Slots:
    """The adapters in a model, by name."""

    def __init__(self, model: nn.Module) -> None:
        """Replace the model's linear layers; until something is assigned it computes the base."""
        self._batch = _Batch()
        self._layers: dict[str, MultiAdapterLinear] = {}
        self._slots: dict[str, int] = {}
        # A number is never used twice: a late token can't meet another adapter in its slot.
        self._numbers = count(BASE_SLOT + 1)
        for path, linear in linears(model).items():
            assert isinstance(linear, nn.Linear)
            parent, _, child = path.rpartition(".")
            self._layers[path] = MultiAdapterLinear(linear, self._batch)
            setattr(model.get_submodule(parent), child, self._layers[path])

    def load(self, name: str, factors: Mapping[str, LoraFactors]) -> None:
        """Put an adapter in, cast to each layer's dtype and device."""
        assert name not in self._slots, f"{name} is loaded already"
        slot = next(self._numbers)
        for path, module_factors in factors.items():
            layer = self._layers[path]
            layer.table[slot] = _place(module_factors, layer.weight)
        # Last, so that the generating thread never sees a slot that is half loaded.
        self._slots[name] = slot

    def unload(self, name: str) -> None:
        """Take an adapter out and free its memory."""
        slot = self._slots.pop(name)
        for layer in self._layers.values():
            layer.table.pop(slot, None)

    def slot(self, name: str | None) -> int:
        """Give the slot of a loaded adapter, or of the base."""
        return BASE_SLOT if name is None else self._slots[name]

    @property
    def in_use(self) -> bool:
        """Whether the forward that runs now has a token with an adapter."""
        return bool(self._batch.segments)

    def assign(self, slot_of_token: Sequence[int]) -> None:
        """Say which slot each token of the next forward belongs to."""
        device = next(iter(self._layers.values())).weight.device
        self._batch.tokens = len(slot_of_token)
        self._batch.segments = segments(slot_of_token, device)


def _place(factors: LoraFactors, like: torch.Tensor) -> SlotFactors:
    b = factors.b.to(like.device, like.dtype)
    if factors.columns is not None:
        columns = torch.tensor(factors.columns, device=like.device)
        return SlotFactors(b=b, scale=factors.scale, columns=columns)
    return SlotFactors(b=b, scale=factors.scale, a=factors.a.to(like.device, like.dtype))

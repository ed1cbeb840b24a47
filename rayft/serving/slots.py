"""One model in memory, many adapters in it: which token has which, and the linears that add them.

A slot is a number that stands for an adapter in a forward; 0 is the base. Before a forward the engine says
which slot each of its tokens belongs to (`Slots.assign`); the linears then add each token's own adapter,
those that read the same input together.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from rayft.errors import ResourceError
from rayft.kernels.grouped_lora import DECODE, AdapterTable, Group, Rows, grouped_lora
from rayft.kernels.segment_lora import BASE_SLOT, SlotFactors
from rayft.methods.base import LoraFactors
from rayft.models.targets import linears

__all__ = ["MultiAdapterLinear", "Slots", "widest_rank"]

SLOTS = 4096
"""Adapters at once, the base counted as one: an entry takes 64 bytes a linear."""
WIDEST = 256
"""The largest rank on a GPU; on a CPU there is none."""
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Names of linears that read the same input as a rule. Whether they do is seen when they run."""


def widest_rank(device: str) -> int | None:
    """Give the largest rank that is served on a device; None where there is no largest."""
    return WIDEST if device.startswith("cuda") else None


class _Batch:
    """The tokens of the forward that runs now; all linears of a model read the same one."""

    def __init__(self) -> None:
        self.rows: Rows | None = None
        """None where all of them are the base's."""


class MultiAdapterLinear(nn.Module):
    """A linear layer whose tokens may belong to different adapters.

    It takes over the parameters of the linear that it replaces under the same names.
    """

    def __init__(self, linear: nn.Linear, batch: _Batch) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._batch = batch
        self._group: _LinearGroup | None = None
        self._part = 0

    def join(self, group: _LinearGroup, part: int) -> None:
        """Be one of the linears that read the same input."""
        self._group, self._part = group, part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (…, I) → (…, O), the leading dimensions being the tokens that were assigned."""
        if self._batch.rows is None:
            return functional.linear(x, self.weight, self.bias)
        assert self._group is not None
        return self._group.output(x, self._part, self._batch.rows)


class _LinearGroup:
    """Linears that read the same input: the first that is called computes for all of them."""

    def __init__(self, index: int, members: Sequence[MultiAdapterLinear]) -> None:
        self._index, self._members = index, tuple(members)
        self._ahead: dict[int, torch.Tensor] = {}
        self._x: torch.Tensor | None = None
        for part, member in enumerate(members):
            member.join(self, part)

    def output(self, x: torch.Tensor, part: int, rows: Rows) -> torch.Tensor:
        """Give one member's output; another input than its siblings' costs their work again, no more."""
        if self._x is not x or part not in self._ahead:
            self._ahead = dict(enumerate(self._compute(x, rows)))
            self._x = x
        found = self._ahead.pop(part)
        if not self._ahead:
            self._x = None
        return found

    def _compute(self, x: torch.Tensor, rows: Rows) -> list[torch.Tensor]:
        x_NI = x.reshape(-1, x.shape[-1])
        if x.is_cuda and rows.count > DECODE:
            # A pass over y costs: the base's products accumulate onto the adapters', see `grouped_lora`.
            ys = [x_NI.new_empty(len(x_NI), member.out_features) for member in self._members]
            grouped_lora(x_NI, ys, rows, self._index, accumulate=False)
            for y_NO, member in zip(ys, self._members, strict=True):
                y_NO.addmm_(x_NI, member.weight.t())
                if member.bias is not None:
                    y_NO.add_(member.bias)
        else:
            ys = [functional.linear(x_NI, member.weight, member.bias) for member in self._members]
            grouped_lora(x_NI, ys, rows, self._index)
        return [y_NO.view(*x.shape[:-1], y_NO.shape[1]) for y_NO in ys]


class Slots:
    """The adapters in a model, by name."""

    def __init__(self, model: nn.Module) -> None:
        """Replace the model's linear layers; until something is assigned it computes the base."""
        self._batch = _Batch()
        self._layers: dict[str, MultiAdapterLinear] = {}
        self._slots: dict[str, int] = {}
        self._free = list(range(SLOTS - 1, BASE_SLOT, -1))
        self._lock = threading.Lock()
        for path, linear in linears(model).items():
            assert isinstance(linear, nn.Linear)
            parent, _, child = path.rpartition(".")
            self._layers[path] = MultiAdapterLinear(linear, self._batch)
            setattr(model.get_submodule(parent), child, self._layers[path])
        groups = _grouped(self._layers)
        for index, paths in enumerate(groups):
            _LinearGroup(index, [self._layers[path] for path in paths])
        weight = next(iter(self._layers.values())).weight
        self._table = AdapterTable(
            SLOTS,
            [
                Group(self._layers[paths[0]].in_features, {p: self._layers[p].out_features for p in paths})
                for paths in groups
            ],
            dtype=weight.dtype,
            device=weight.device,
            widest=WIDEST if weight.is_cuda else 2**20,
        )
        self._rows: dict[int, Rows] = {}

    def load(self, name: str, factors: Mapping[str, LoraFactors]) -> None:
        """Put an adapter in, cast to the model's dtype and device.

        Raises:
            ResourceError: if as many adapters as there are slots are in.
        """
        assert name not in self._slots, f"{name} is loaded already"
        with self._lock:
            if not self._free:
                raise ResourceError(f"{SLOTS - 1} adapters are in the model; lower device_bytes")
            slot = self._free.pop()
        try:
            self._table.set(slot, {path: self._place(found) for path, found in factors.items()})
        except BaseException:
            self._free.append(slot)
            raise
        # Last, so that the generating thread never sees a slot that is half loaded.
        self._slots[name] = slot

    def unload(self, name: str) -> None:
        """Take an adapter out and free its memory; a token of it that is late is computed as any other's."""
        slot = self._slots.pop(name)
        self._table.clear(slot)
        self._free.append(slot)

    def slot(self, name: str | None) -> int:
        """Give the slot of a loaded adapter, or of the base."""
        return BASE_SLOT if name is None else self._slots[name]

    @property
    def in_use(self) -> bool:
        """Whether the forward that runs now has a token with an adapter."""
        return self._batch.rows is not None

    def assign(self, slot_of_token: Sequence[int]) -> None:
        """Say which slot each token of the next forward belongs to."""
        rows, distinct = None, set(slot_of_token)
        if distinct - {BASE_SLOT}:
            rows = self._kept(len(slot_of_token), len(distinct))
            rows.slots.copy_(torch.tensor(slot_of_token, dtype=torch.int32))
        self.use(rows)

    def rows(self, slots: torch.Tensor, distinct: int) -> Rows:
        """Make the buffers of a batch for `use`, which read the slots (N,) int32 where they lie.

        Args:
            slots: whose each token is; others may be written into it later, for another `use` or a replay.
            distinct: how many different ones there are at most, the base's counted.
        """
        return Rows(self._table, len(slots), slots=slots, distinct=distinct)

    def use(self, rows: Rows | None) -> None:
        """Let the next forward be of these rows, None for the base's; a CUDA graph may hold what it does."""
        self._batch.rows = rows
        if rows is not None:
            rows.prepare()

    def _kept(self, count: int, distinct: int) -> Rows:
        if count > DECODE:
            return Rows(self._table, count, distinct=distinct)
        if count not in self._rows:
            self._rows[count] = Rows(self._table, count)
        return self._rows[count]

    def _place(self, factors: LoraFactors) -> SlotFactors:
        like = self._table.entries.device, self._table.dtype
        b = factors.b.to(*like)
        if factors.columns is not None:
            columns = torch.tensor(factors.columns, device=b.device)
            return SlotFactors(b=b, scale=factors.scale, columns=columns)
        return SlotFactors(b=b, scale=factors.scale, a=factors.a.to(*like))


def _grouped(layers: Mapping[str, MultiAdapterLinear]) -> list[list[str]]:
    """Put linears of one parent that are siblings by name and read as many inputs together."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for number, (path, layer) in enumerate(layers.items()):
        parent, _, child = path.rpartition(".")
        kind = next((index for index, names in enumerate(SIBLINGS) if child in names), -1 - number)
        found.setdefault((parent, kind, layer.in_features), []).append(path)
    return list(found.values())

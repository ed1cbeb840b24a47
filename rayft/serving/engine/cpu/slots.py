"""One model in memory, with many adapters in it.

A slot is a number that stands for an adapter in a forward; 0 is the base. Before each forward the engine says
which slot each of its tokens belongs to (`Slots.assign`). Hooks of the linear layers then add to each token's
output what its adapter contributes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rayft.artifacts import AdapterArtifact
from rayft.kernels.segment_lora import BASE_SLOT, Segment, SlotFactors, segment_lora, segments
from rayft.methods.base import LoraFactors
from rayft.models.targets import linears
from rayft.serving.engine.api import slot_factors

__all__ = ["Slots"]


class Slots:
    """The adapters in a model, by name."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Add hooks to the model's linear layers, which compute the base until tokens are assigned.

        Args:
            model: the model, on the CPU.
            dtype: the dtype in which it computes.
        """
        self._dtype = dtype
        self._tables: dict[str, dict[int, SlotFactors]] = {}
        self._adapters: dict[str, AdapterArtifact] = {}
        self._slots: dict[str, dict[int | None, int]] = {}
        self._numbers = itertools.count(BASE_SLOT + 1)
        self._tokens = 0
        self._segments: tuple[Segment, ...] = ()
        for path, linear in linears(model).items():
            self._tables[path] = {}
            linear.register_forward_hook(partial(self._add, self._tables[path]))

    def cast(self, artifact: AdapterArtifact) -> AdapterArtifact:
        """Return an adapter in the model's dtype. Any thread may do this; nothing else here is changed."""
        modules = {path: self._cast(factors) for path, factors in artifact.modules.items()}
        return replace(artifact, modules=modules)

    def load(self, name: str, artifact: AdapterArtifact) -> None:
        """Add an adapter that is in the model's dtype (see `cast`)."""
        assert name not in self._adapters, f"{name} is loaded already"
        self._adapters[name] = artifact
        self._slots[name] = {None: self._fill(artifact)}

    def unload(self, name: str) -> None:
        """Remove an adapter at all its ranks, and free its memory."""
        for slot in self._slots.pop(name).values():
            for table in self._tables.values():
                table.pop(slot, None)
        del self._adapters[name]

    def slot(self, name: str | None, rank: int | None = None) -> int:
        """Return the slot of a loaded adapter, or the base's.

        A lower rank has a slot of its own from its first use on, whose factors are views of the adapter's.

        Raises:
            SqueezeError: if a lower rank is asked of an adapter that was never squeezed.
        """
        if name is None:
            return BASE_SLOT
        slots, adapter = self._slots[name], self._adapters[name]
        key = None if rank is None or rank >= adapter.rank else rank
        if key is not None and key not in slots:
            slots[key] = self._fill(adapter.at_rank(key))
        return slots[key]

    def assign(self, slot_of_token: Sequence[int]) -> None:
        """Set the slot of each token of the next forward."""
        self._tokens, self._segments = len(slot_of_token), segments(slot_of_token)

    def _add(self, table: dict[int, SlotFactors], _: nn.Module, inputs: Any, y: torch.Tensor) -> None:
        """Add each token's adapter to the output of a linear layer, in place."""
        rows = y.numel() // y.shape[-1]
        assert rows == self._tokens, f"a linear layer computes {rows} rows for {self._tokens} tokens"
        if self._segments:
            x = inputs[0]
            segment_lora(x.reshape(rows, -1), y.view(rows, -1), self._segments, table)

    def _fill(self, adapter: AdapterArtifact) -> int:
        """Put an adapter into a new slot."""
        slot = next(self._numbers)
        for path, factors in adapter.modules.items():
            self._tables[path][slot] = slot_factors(factors)
        return slot

    def _cast(self, factors: LoraFactors) -> LoraFactors:
        """Cast factors; a selector's A is not cast, because its columns are used instead."""
        a = factors.a if factors.columns is not None else factors.a.to(self._dtype)
        return LoraFactors(a, factors.b.to(self._dtype), factors.scale, factors.columns)

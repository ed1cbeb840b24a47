"""Adds each token's adapter to a linear layer's product, in compiled models and in captured CUDA graphs.

A layer calls one operator that torch.compile does not look into, and that returns a new tensor, so the
compiler copies nothing and sees no branch on whether a step has adapters. Inside, Python decides: a step
without adapters launches nothing more than the base. A graph holds what was decided when it was captured, so
the caller must keep graphs of steps with and without adapters apart, as vLLM does.

What changes from step to step is read from fixed addresses: the slot of each token (`Batch.slots`), and the
factors of each slot (`AdapterTable.entries`). The first layer of a step sorts the tokens and looks up their
factors, which is part of the graph.

Shapes: N tokens, I inputs, O outputs of a fused layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from rayft.kernels.grouped_lora import DECODE, AdapterTable, Rows, grouped_lora, variant
from rayft.kernels.launch_triton import compiling_ahead
from rayft.kernels.segment_lora import BASE_SLOT
from rayft.serving.engine.vllm.shard import Part

__all__ = ["AdaptedLinear", "Batch", "Product", "Site"]

Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Computes the base's product (N × O) from the input (N × I) and the bias (O,)."""


@dataclass(eq=False)
class Site:
    """A linear layer of the engine, which may fuse several of the model's files, such as q, k and v."""

    group: int
    """Its index in the table's groups."""
    parts: tuple[Part, ...]
    """What it fuses, in the order of its outputs."""
    product: Product
    weight: Callable[[], torch.Tensor] | None = None
    """Returns the base's weight (O × I); None if it is quantised."""

    @cached_property
    def outputs(self) -> int:
        """Number of outputs of all parts."""
        return sum(part.size for part in self.parts)


class Batch:
    """The tokens of the step that runs now: which slot each of them uses."""

    def __init__(self, table: AdapterTable, tokens: int, requests: int, captured: Collection[int]) -> None:
        """Begin with a step without adapters.

        Args:
            table: the adapters.
            tokens: largest number of tokens in a step.
            requests: largest number of requests in a step.
            captured: numbers of tokens for which graphs may be captured.
        """
        self._table, self._requests = table, requests
        self._captured = frozenset(captured)
        self._padded = max(self._captured, default=0)
        self.slots = torch.zeros(max(tokens, self._padded), dtype=torch.int32, device=table.entries.device)
        """Slot of each token, then the base's up to the largest captured number of tokens: (N,), int32."""
        self._last = np.zeros(0, dtype=np.int32)
        self._kept: dict[int, Rows] = {}
        self._rows: Rows | None = None
        self._first: Site | None = None
        self.active = False
        """Whether the step has a request with an adapter."""

    def assign(self, slots: np.ndarray | None) -> None:
        """Set the slot of each token (N,), int32, of the next step; None if no request has an adapter."""
        self.active = slots is not None
        if slots is None:
            if len(self._last):
                # In case a graph with adapters is replayed for this step too.
                self.slots.zero_()
                self._last = self._last[:0]
            return
        if np.array_equal(slots, self._last):
            return
        padded = np.full(max(len(slots), self._padded), BASE_SLOT, dtype=np.int32)
        padded[: len(slots)] = slots
        host = torch.from_numpy(padded)
        if self.slots.is_cuda:
            # PyTorch reuses pinned memory only when the copy out of it is done.
            host = host.pin_memory()
        self.slots[: len(padded)].copy_(host, non_blocking=True)
        self._last = slots

    def compute(self, site: Site, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute a layer's output (…, O) from its input (…, I), with the adapters of its tokens."""
        if not self.active:
            return site.product(x, bias)
        x_NI = x if x.dim() == 2 else x.reshape(-1, x.size(-1))
        count, rows = x_NI.size(0), self._rows
        self._first = self._first or site
        if rows is None or site is self._first or rows.count != count:
            self._rows = rows = self._buffers(count)
            rows.prepare()
        if site.weight is not None and count > DECODE:
            # The adapters write y first, and the base's product is added to it, which saves a pass over y.
            y_NO = x_NI.new_empty((count, site.outputs))
            grouped_lora(x_NI, y_NO, rows, site.group, accumulate=False)
            y_NO.addmm_(x_NI, site.weight().t())
            if bias is not None:
                y_NO.add_(bias)
            return y_NO if x.dim() == 2 else y_NO.view(*x.shape[:-1], site.outputs)
        y = site.product(x, bias)
        grouped_lora(x_NI, y if y.dim() == 2 else y.view(count, -1), rows, site.group)
        return y

    def warm_up(self) -> None:
        """Compile the kernels for all numbers of tokens; otherwise a request would wait for that."""
        if self._table.entries.is_cuda:
            with compiling_ahead():
                self._launch_all()
            self._launch_all()

    def _launch_all(self) -> None:
        """Launch each kernel once."""
        table, known = self._table, set()
        device = table.entries.device
        # One group of each shape: the others use the same kernels.
        shapes = {(group.inputs, *group.outputs.values()): index for index, group in enumerate(table.groups)}
        for count in range(1, len(self.slots) + 1):
            kind = variant(count, [table.groups[index] for index in shapes.values()], device)
            if kind in known:
                continue
            known.add(kind)
            rows = self._buffers(count)
            rows.prepare()
            for (inputs, *outputs), index in shapes.items():
                x_NI = torch.zeros(count, inputs, dtype=table.dtype, device=device)
                y_NO = x_NI.new_zeros(count, sum(outputs))
                grouped_lora(x_NI, y_NO, rows, index)
                if count > DECODE:
                    grouped_lora(x_NI, y_NO, rows, index, accumulate=False)

    def _buffers(self, count: int) -> Rows:
        if count in self._kept:
            return self._kept[count]
        distinct = min(count, self._requests) + 1
        rows = Rows(self._table, count, slots=self.slots[:count], distinct=distinct)
        if count in self._captured:
            # Graphs hold the addresses of these buffers.
            self._kept[count] = rows
        return rows


class AdaptedLinear:
    """Computes a layer's product with the adapters of the step that runs now."""

    _known: list[tuple[Site, Batch, torch.Tensor]] = []
    _numbers: dict[int, int] = {}

    def __init__(self, site: Site, batch: Batch) -> None:
        # A tensor stands for the layer, so that layers that are otherwise alike share one compiled graph. It
        # is on the device, because Inductor takes the output of an operator with an input on the CPU for
        # unaligned, and compiles slower kernels for what reads it. It is known by its address, which is read
        # without waiting for the device.
        self._handle = torch.tensor([len(self._known)], device=batch.slots.device)
        self._numbers[self._handle.data_ptr()] = len(self._known)
        # Kept, so that no other tensor gets the address.
        self._known.append((site, batch, self._handle))
        self._outputs = site.outputs

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute (N × I) → (N × O)."""
        found: torch.Tensor = torch.ops.rayft.adapted_linear(x, self._handle, bias, self._outputs)
        return found


def _adapted_linear(
    x: torch.Tensor, handle: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    number = AdaptedLinear._numbers.get(handle.data_ptr())
    site, batch, _ = AdaptedLinear._known[int(handle) if number is None else number]
    return batch.compute(site, x, bias)


def _shape_only(
    x: torch.Tensor, handle: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


_library = torch.library.Library("rayft", "FRAGMENT")
_library.define("adapted_linear(Tensor x, Tensor handle, Tensor? bias, int outputs) -> Tensor")
for _key in ("CPU", "CUDA"):
    _library.impl("adapted_linear", _adapted_linear, _key)
torch.library.register_fake("rayft::adapted_linear", _shape_only, lib=_library)

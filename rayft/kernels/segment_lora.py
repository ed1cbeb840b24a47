"""Add adapters to a linear's output when the tokens of one batch belong to different adapters.

Semantics:

    for n in range(N):
        s = slot_of_token[n]
        if s in table:                                  # never true for slot 0, the base
            h_R = x[n, columns[s]]      if s selects inputs      else x[n] @ A[s].T
            y[n] += scale[s] * (h_R @ B[s].T)

Each adapter is multiplied at its own rank: ranks are not padded to the largest, and base tokens take part
in no product. Tokens whose slot has no factors in a layer are not changed there.

Shapes: N tokens, I inputs, O outputs, R the rank of one adapter. x (N × I), y (N × O), A (R × I),
B (O × R), columns (R,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["BASE_SLOT", "Segment", "SlotFactors", "reference", "segment_lora", "segments"]

BASE_SLOT = 0
"""The slot of tokens that use no adapter."""


@dataclass(frozen=True)
class SlotFactors:
    """The factors of one adapter in one layer: B, and either A or the columns that A selects."""

    b: torch.Tensor
    """B (O × R)."""
    scale: float
    """The factor s of ΔW = s·B·A."""
    a: torch.Tensor | None = None
    """A (R × I)."""
    columns: torch.Tensor | None = None
    """Selected inputs (R,), int64."""

    def __post_init__(self) -> None:
        assert (self.a is None) != (self.columns is None), "a slot has either A or columns"


@dataclass(frozen=True)
class Segment:
    """The tokens of one slot in a batch."""

    slot: int
    rows: slice | torch.Tensor
    """A slice if the tokens are contiguous, so that nothing is copied, or else their indices."""


def segments(slot_of_token: Sequence[int], device: torch.device | str = "cpu") -> tuple[Segment, ...]:
    """Group the tokens of a batch by slot; base tokens are left out.

    One call for a forward pass serves all its layers.
    """
    rows: dict[int, list[int]] = {}
    for row, slot in enumerate(slot_of_token):
        if slot != BASE_SLOT:
            rows.setdefault(slot, []).append(row)
    return tuple(Segment(slot, _rows(found, device)) for slot, found in rows.items())


def segment_lora(
    x_NI: torch.Tensor, y_NO: torch.Tensor, batch: Sequence[Segment], table: Mapping[int, SlotFactors]
) -> None:
    """Add each segment's adapter to y, in place.

    Args:
        x_NI: the linear's input.
        y_NO: its output, to which the adapters are added.
        batch: the segments of the N tokens (see `segments`).
        table: slot → factors in this layer, in x's dtype and on its device.
    """
    for segment in batch:
        factors = table.get(segment.slot)
        if factors is None:
            continue
        if isinstance(segment.rows, slice):
            h_R = _inner(x_NI[segment.rows], factors)
            y_NO[segment.rows].addmm_(h_R, factors.b.t(), alpha=factors.scale)
        else:
            h_R = _inner(x_NI.index_select(0, segment.rows), factors)
            y_NO.index_add_(0, segment.rows, h_R @ factors.b.t(), alpha=factors.scale)


def reference(
    x_NI: torch.Tensor, y_NO: torch.Tensor, slot_of_token: Sequence[int], table: Mapping[int, SlotFactors]
) -> torch.Tensor:
    """Compute the result of `segment_lora`, token by token and in float64, as a new tensor."""
    result = y_NO.double()
    for row, slot in enumerate(slot_of_token):
        if slot in table:
            factors, x_I = table[slot], x_NI[row].double()
            h_R = x_I[factors.columns] if factors.a is None else factors.a.double() @ x_I
            result[row] += factors.scale * (factors.b.double() @ h_R)
    return result


def _rows(rows: list[int], device: torch.device | str) -> slice | torch.Tensor:
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _inner(x_NI: torch.Tensor, factors: SlotFactors) -> torch.Tensor:
    if factors.a is None:
        assert factors.columns is not None
        return x_NI.index_select(1, factors.columns)
    return x_NI @ factors.a.t()

"""Which part of an adapter a worker needs when several GPUs share each linear layer (tensor parallelism)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch

from rayft.kernels.segment_lora import SlotFactors

__all__ = ["Part", "Parts", "described", "key", "parts_of", "shard"]


@dataclass(frozen=True)
class Part:
    """One linear layer of the model's files, and the inputs and outputs of it that a worker has."""

    name: str
    """Its path in the model's files, which is its name in adapters."""
    shape: tuple[int, int]
    """Outputs and inputs of the whole layer."""
    outputs: tuple[int, int]
    """The first of its outputs here, and one more than the last."""
    inputs: tuple[int, int]
    """The first of its inputs here, and one more than the last."""

    @property
    def size(self) -> int:
        """Number of its outputs here."""
        return self.outputs[1] - self.outputs[0]


Parts = tuple[Part, ...]
"""All that a worker has, in the order of its table."""


def described(parts: Parts) -> str:
    """Return text that tells another process what a worker has."""
    return json.dumps([astuple(part) for part in parts])


def parts_of(text: str) -> Parts:
    """Return what a worker has from the text of `described`."""
    found: Sequence[tuple[str, list[int], list[int], list[int]]] = json.loads(text)
    return tuple(
        Part(name, (shape[0], shape[1]), (outputs[0], outputs[1]), (inputs[0], inputs[1]))
        for name, shape, outputs, inputs in found
    )


def key(parts: Parts, dtype: torch.dtype) -> str:
    """Return a text that is the same for workers that need the same bytes of every adapter."""
    return hashlib.sha256(f"{dtype}{described(parts)}".encode()).hexdigest()[:16]


def shard(factors: SlotFactors, part: Part) -> SlotFactors | None:
    """Return the factors that a worker needs, as views where they are dense; None if it needs nothing.

    If the outputs are divided, a worker needs its rows of B. If the inputs are divided, it needs its columns
    of A, and the workers' products are added up with the base's. Of a selector it keeps the inputs that it
    has, so the rank may be lower there.
    """
    b, (first, end) = factors.b[slice(*part.outputs)], part.inputs
    if factors.columns is None:
        assert factors.a is not None
        return SlotFactors(b=b, scale=factors.scale, a=factors.a[:, first:end])
    kept = (factors.columns >= first) & (factors.columns < end)
    if not bool(kept.any()):
        return None
    return SlotFactors(b=b[:, kept], scale=factors.scale, columns=factors.columns[kept] - first)

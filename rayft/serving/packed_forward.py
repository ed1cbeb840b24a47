"""The packed engine's forward on CPUs: each request has keys and values of its own.

Attention takes the packed tokens apart: one fused call for each request and layer. Nothing is padded to the
longest, no mask between requests is made, and what overflows in one stays in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from rayft.serving.packed_row import Part, RowCache, pages, running
from rayft.serving.slots import Slots

__all__ = ["OwnForward", "causal"]


class KeysValues(RowCache):
    """One request's keys and values: for each layer (2 × heads × capacity × head size)."""

    def __init__(self) -> None:
        super().__init__()
        self._layers: dict[int, torch.Tensor] = {}

    def append(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new ones (2 × heads × new × size), give all (1 × heads × (length + new) × size, twice)."""
        end = self.length + new.shape[2]
        held = self._layers.get(layer)
        if held is None or held.shape[2] < end:
            grown = new.new_empty(2, new.shape[1], pages(end), new.shape[3])
            if held is not None:
                grown[:, :, : self.length] = held[:, :, : self.length]
            self._layers[layer] = held = grown
        held[:, :, self.length : end] = new
        keys, values = held[:, :, :end].split(1)
        return keys, values


class OwnForward:
    """See `rayft.serving.packed_row.Forward`."""

    def __init__(self, model: Any, slots: Slots) -> None:
        self._model, self._slots = model, slots
        self.layers: set[int] = set()

    def fresh(self) -> KeysValues:
        """Give a request a place for its keys and values."""
        return KeysValues()

    def release(self, cache: RowCache) -> None:
        """Take the place back: it is the request's own."""

    @torch.inference_mode()
    def logits(self, parts: Sequence[Part]) -> torch.Tensor:
        """Run the model: the logits after the last token of each complete part (parts × V)."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for part in parts:
            first = part.row.cache.length
            ids += part.row.tokens[first : first + part.new]
            positions += range(first, first + part.new)
            slots += [part.row.slot] * part.new
        self._slots.assign(slots)
        running.attend, running.layers = partial(self._attend, parts), self.layers
        kept = [part.end - 1 for part in parts if part.complete]
        device = self._model.device
        output = self._model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(kept, dtype=torch.long, device=device),
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def _attend(
        self,
        parts: Sequence[Part],
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Attend within each part; see `rayft.serving.packed_row.Attend`."""
        _, heads, total, size = query.shape
        shared = key.shape[1]
        out = query.new_empty(1, total, heads, size)
        both = torch.cat((key, value))
        for part in parts:
            here, cache = slice(part.start, part.end), part.row.cache
            assert isinstance(cache, KeysValues)
            k, v = cache.append(layer, both[:, :, here])
            if part.new == 1:
                # Heads that share keys are as so many questions to them; all keys are in its past.
                if window is not None:
                    k, v = k[:, :, -window:], v[:, :, -window:]
                asked = query[:, :, part.start].view(1, shared, heads // shared, size)
                # With four dimensions the fused kernel is taken, with three the slow one.
                found = functional.scaled_dot_product_attention(asked, k, v, scale=scaling)
                out[0, part.start] = found.view(heads, -1)
                continue
            out[0, here] = causal(query[:, :, here], k, v, scaling, window)[0].transpose(0, 1)
        return out


def causal(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Attend to what lies before: query (1 × H × new × D), the last of k and v (1 × shared × length × D)."""
    new, length = query.shape[2], k.shape[2]
    k, v = (one.repeat_interleave(query.shape[1] // k.shape[1], 1) for one in (k, v))
    mask = None
    if length > new or (window is not None and length > window):
        places = torch.arange(length, device=query.device)
        apart = places[length - new :, None] - places
        mask = (apart >= 0) & (apart < (window or length))
    return functional.scaled_dot_product_attention(query, k, v, mask, is_causal=mask is None, scale=scaling)

"""The KV cache of one sequence: its keys and values in every layer.

Memory grows by whole pages. The scheduler counts the pages of all sequences against the limit.
"""

from __future__ import annotations

import torch

__all__ = ["PAGE", "KVCache", "page_tokens"]

PAGE = 64
"""Number of tokens in a page."""


def page_tokens(tokens: int) -> int:
    """Return how many tokens the pages for a number of tokens can hold."""
    return -(-tokens // PAGE) * PAGE


class KVCache:
    """Keys and values of the first `length` tokens of a sequence.

    In each layer they are one tensor (2 × heads × capacity × size).
    """

    def __init__(self) -> None:
        self.length = 0
        """Number of tokens in the cache. The runner raises it after the last layer of a forward."""
        self._layers: dict[int, torch.Tensor] = {}

    def append(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values of the next tokens in a layer (2 × heads × new tokens × size).

        Returns:
            Keys and values of all tokens, each (1 × heads × tokens × size).
        """
        end = self.length + new.shape[2]
        held = self._layers.get(layer)
        if held is None or held.shape[2] < end:
            grown = new.new_empty(2, new.shape[1], page_tokens(end), new.shape[3])
            if held is not None:
                grown[:, :, : self.length] = held[:, :, : self.length]
            self._layers[layer] = held = grown
        held[:, :, self.length : end] = new
        keys, values = held[:, :, :end].split(1)
        return keys, values

    def clear(self) -> None:
        """Free the memory; the sequence's tokens have to be processed again."""
        self.length, self._layers = 0, {}

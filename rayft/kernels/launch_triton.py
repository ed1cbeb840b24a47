"""Launching a Triton kernel many times at little cost for the host.

`kernel[grid](…)` binds and specialises every argument anew, tens of microseconds a launch; with some
hundred layers that is a good part of a step. A launch here is looked up by all that Triton specialises on:
dtypes, integers, constants, alignment. What is new, or not aligned, goes Triton's own way.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Launcher"]

ALIGNED = 16
"""Bytes; Triton compiles other loads for pointers that are not."""


class Launcher:
    """One kernel, whose arguments are tensors, then numbers, then compile-time constants.

    Args:
        kernel: a `triton.jit` function.
        options: its launch options, such as `num_warps`.
    """

    def __init__(self, kernel: Any, **options: int) -> None:
        self._kernel, self._options = kernel, options
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        numbers: tuple[int, ...],
        constants: tuple[int | bool, ...],
        factor: tuple[float, ...] = (),
    ) -> None:
        """Launch on the current stream; `factor` stands after the numbers and is never specialised on."""
        arguments = (*tensors, *numbers, *factor, *constants)
        if any(tensor.data_ptr() % ALIGNED for tensor in tensors):
            self._kernel[grid](*arguments, **self._options)
            return
        key = (tensors[0].device, *[tensor.dtype for tensor in tensors], numbers, constants)
        compiled = self._known.get(key)
        if compiled is None:
            self._known[key] = self._kernel[grid](*arguments, **self._options)
        else:
            compiled[grid](*arguments)

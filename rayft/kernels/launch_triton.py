"""Launching a Triton kernel many times at little cost for the host, and compiling it once.

`kernel[grid](…)` binds and specialises every argument anew, tens of microseconds a launch; with some
hundred layers that is a good part of a step. A launch here is looked up by all that Triton specialises on:
dtypes, integers, constants, alignment. What is new, or not aligned, goes Triton's own way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rayft.files import locked

__all__ = ["Launcher", "aligned"]

ALIGNED = 16
"""Bytes; Triton compiles other loads for pointers that are not."""


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or a copy of it if its memory does not begin at a multiple of `ALIGNED` bytes.

    A kernel that gets both kinds of addresses is compiled for every combination of them.
    """
    return tensor.clone() if tensor.data_ptr() % ALIGNED else tensor


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
            with _alone(getattr(self._kernel, "__name__", "kernel")):
                self._known[key] = self._kernel[grid](*arguments, **self._options)
        else:
            compiled[grid](*arguments)


def _cache() -> Path | None:
    """Return the folder in which Triton keeps what it compiled; all processes of a user share it."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return Path(knobs.cache.dir)


@contextmanager
def _alone(kernel: str) -> Iterator[None]:
    """Let one process of a machine compile a kernel at a time, so that the others find it in Triton's cache.

    Where there is no cache, or its files can't be locked, each process compiles for itself.
    """
    folder = _cache()
    with ExitStack() as held:
        if folder is not None:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(folder / f"rayft-{kernel}.lock"))
        yield

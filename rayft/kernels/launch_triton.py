"""Launch a Triton kernel many times at little cost for the host, and compile it once on a machine.

`kernel[grid](…)` binds and specialises every argument anew, which takes tens of microseconds a launch; with
some hundred layers that is a good part of a step. `Launcher` looks the compiled kernel up by everything
that Triton specialises on: dtypes, constants, alignment, and of integers whether they are 1 or multiples of
16. A combination that is new, or tensors that are not aligned, are launched by Triton itself.

Each call still has to find out what the arguments are. A caller that knows that they are specialised like
those of an earlier launch gets its kernel from `Launcher.found`, and passes it addresses, which takes less.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rayft.files import locked

__all__ = [
    "Launch",
    "Launcher",
    "aligned",
    "compiling_ahead",
    "current_stream",
    "inductor_cache",
    "kernel_cache",
]

Launch = Callable[..., None]
"""Launches a compiled kernel: (programs along x, programs along y, stream, *addresses, *numbers). Triton must
specialise on the numbers as on those of the kernel's first launch, and the addresses must be aligned."""

ALIGNED = 16
"""Alignment in bytes that Triton specialises on: it compiles other loads for pointers without it."""


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or a copy of it if its memory does not begin at a multiple of `ALIGNED` bytes.

    Without the copy, a kernel would be compiled for every combination of aligned and other tensors.
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
        """Launch on the current stream.

        Args:
            grid: numbers of programs.
            tensors: the kernel's first arguments.
            numbers: integers below 2³¹, passed after the tensors.
            constants: compile-time constants, passed last.
            factor: floats, passed after the integers, on which Triton does not specialise.
        """
        arguments = (*tensors, *numbers, *factor, *constants)
        if _ahead:
            self._kernel.warmup(*arguments, grid=grid, **self._options)
            return
        if any(tensor.data_ptr() % ALIGNED for tensor in tensors):
            self._kernel[grid](*arguments, **self._options)
            return
        key = _key(tensors, numbers, constants)
        compiled = self._known.get(key)
        if compiled is None:
            with _alone(getattr(self._kernel, "__name__", "kernel")):
                self._known[key] = self._kernel[grid](*arguments, **self._options)
        else:
            compiled[grid](*arguments)

    def found(
        self,
        tensors: tuple[torch.Tensor, ...],
        numbers: tuple[int, ...],
        constants: tuple[int | bool, ...],
    ) -> Launch | None:
        """Return the kernel that was compiled for such arguments, if their addresses are aligned.

        Triton's hooks around launches are not called for it. The result is None if the launcher has launched
        nothing of the kind with aligned tensors, and in Triton's interpreter.
        """
        compiled = self._known.get(_key(tensors, numbers, constants))
        if compiled is None:
            return None
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

        def launch(x: int, y: int, stream: int, *arguments: int) -> None:
            run(x, y, 1, stream, function, metadata, None, None, None, *arguments, *constants)

        return launch


_ahead: list[bool] = []
"""Not empty while kernels are compiled ahead."""


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Compile what is launched here in several threads, into Triton's cache, and launch nothing."""
    import triton

    # Triton compiles a kernel at the latest when its mode ends.
    with _alone("ahead"), ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        _ahead.append(True)
        try:
            yield
        finally:
            _ahead.clear()


def current_stream(device: torch.device) -> Callable[[], int]:
    """Return what gives the address of the current stream of a device, on which launches are put."""
    if device.type != "cuda":
        return lambda: 0
    from triton.runtime.driver import driver

    return partial(driver.active.get_current_stream, device.index)


def _key(
    tensors: tuple[torch.Tensor, ...], numbers: tuple[int, ...], constants: tuple[int | bool, ...]
) -> tuple[Any, ...]:
    """Return everything on which Triton specialises a kernel, for aligned tensors."""
    kinds = [number if number == 1 else -(number % ALIGNED == 0) for number in numbers]
    return (tensors[0].device, *[tensor.dtype for tensor in tensors], *kinds, constants)


def kernel_cache() -> Path | None:
    """Return the folder of Triton's cache, which all processes of a user share; None without Triton."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return Path(knobs.cache.dir)


def inductor_cache() -> Path:
    """Return the folder in which `torch.compile` keeps what it has made, which need not exist."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()).absolute()


@contextmanager
def _alone(kernel: str) -> Iterator[None]:
    """Hold a kernel's lock while compiling, so that other processes of the machine find it in Triton's cache.

    If there is no cache, or its files can't be locked, each process compiles the kernel for itself.
    """
    folder = kernel_cache()
    with ExitStack() as held:
        if folder is not None:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(folder / f"rayft-{kernel}.lock"))
        yield

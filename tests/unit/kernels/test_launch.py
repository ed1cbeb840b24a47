"""A launch is looked up by what Triton specialises on; the kernel is a fake that records its launches."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayft.kernels import launch_triton
from rayft.kernels.launch_triton import Launcher, compiling_ahead

GRID = (2, 3, 1)


class Kernel:
    """A stand-in for a `triton.jit` function: each launch through it compiles anew."""

    def __init__(self) -> None:
        self.slow: list[tuple[Any, ...]] = []
        self.fast: list[tuple[Any, ...]] = []
        self.ahead: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any, **options: int) -> Compiled:
            assert options == {"num_warps": 4}
            self.slow.append((grid, arguments))
            return Compiled(self)

        return launch

    def warmup(self, *arguments: Any, grid: tuple[int, int, int], **options: int) -> None:
        assert options == {"num_warps": 4}
        self.ahead.append((grid, arguments))


class Compiled:
    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def run(self, *arguments: Any) -> None:
        self.kernel.fast.append(arguments)

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.kernel.fast.append((grid, arguments))


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(64, dtype=dtype), torch.zeros(64, dtype=dtype)


def test_the_same_launch_is_compiled_once_whatever_its_factor() -> None:
    kernel = Kernel()
    launch, given = Launcher(kernel, num_warps=4), tensors()
    launch(GRID, given, (5, 64), (16, True), (0.5,))
    launch(GRID, tensors(), (5, 64), (16, True), (0.25,))
    assert len(kernel.slow) == len(kernel.fast) == 1
    assert kernel.slow[0] == (GRID, (*given, 5, 64, 0.5, 16, True))
    assert kernel.fast[0][1][2:] == (5, 64, 0.25, 16, True)


def test_what_triton_specialises_on_compiles_anew() -> None:
    kernel = Kernel()
    launch = Launcher(kernel, num_warps=4)
    launch(GRID, tensors(), (5, 64), (16, True))
    launch(GRID, tensors(torch.bfloat16), (5, 64), (16, True))
    launch(GRID, tensors(), (1, 64), (16, True))
    launch(GRID, tensors(), (5, 64), (32, True))
    launch(GRID, tensors(), (5, 64), (16, False))
    assert (len(kernel.slow), len(kernel.fast)) == (5, 0)


def test_a_pointer_that_is_not_aligned_is_never_kept() -> None:
    kernel = Kernel()
    launch = Launcher(kernel, num_warps=4)
    first, second = tensors()
    for _ in range(2):
        launch(GRID, (first[1:], second), (5,), (16,))
    assert (len(kernel.slow), len(kernel.fast)) == (2, 0)
    launch(GRID, (first, second), (5,), (16,))
    launch(GRID, (first[1:], second), (5,), (16,))
    assert (len(kernel.slow), len(kernel.fast)) == (4, 0)


def test_a_compiled_kernel_is_launched_with_addresses() -> None:
    kernel = Kernel()
    launch, given = Launcher(kernel, num_warps=4), tensors()
    assert launch.found(given, (5, 64), (16, True)) is None
    launch(GRID, given, (5, 64), (16, True))
    found = launch.found(tensors(), (7, 32), (16, True))
    assert found
    found(2, 3, 99, 1024, 2048, 7, 32)
    assert kernel.fast == [(2, 3, 1, 99, 7, (4, 1, 0), None, None, None, 1024, 2048, 7, 32, 16, True)]
    assert launch.found(given, (5, 63), (16, True)) is None


def test_what_is_compiled_ahead_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[Any] = []

    def mode(pool: Any) -> Any:
        threads.append(pool)
        return nullcontext()

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(AsyncCompileMode=mode))
    monkeypatch.setattr(launch_triton, "kernel_cache", lambda: None)
    kernel, given = Kernel(), tensors()
    launch = Launcher(kernel, num_warps=4)
    with compiling_ahead():
        launch(GRID, given, (5, 64), (16, True))
    assert kernel.ahead == [(GRID, (*given, 5, 64, 16, True))]
    assert (len(threads), kernel.slow, kernel.fast) == (1, [], [])
    launch(GRID, given, (5, 64), (16, True))
    assert len(kernel.slow) == len(kernel.ahead) == 1

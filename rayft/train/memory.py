"""Measure the peak memory of one run in a process that may train several."""

from __future__ import annotations

import threading
from typing import Self

import psutil
import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """Watch the memory in a block.

    On a GPU this is the allocator's own peak. On a CPU the resident set is sampled 20 times a second: the
    kernel's high-water mark never falls, so it would show the peak of the largest earlier run.

    Attributes:
        peak: the most memory so far, in bytes.
    """

    def __init__(self, device: str) -> None:
        self.peak = 0
        self._cuda = device.startswith("cuda")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self.peak = int(torch.cuda.max_memory_allocated())
        else:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self._done.wait(0.05):
                return

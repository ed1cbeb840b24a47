"""Measure the peak memory of one run in a process that may train several."""

from __future__ import annotations

import threading

import psutil
import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """Watch the memory from construction until `stop`.

    On a GPU this is the allocator's own peak. On a CPU the resident set is sampled 20 times a second: the
    kernel's high-water mark never falls, so it would show the peak of the largest earlier run.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._peak = 0
        self._done = threading.Event()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def stop(self) -> int:
        """Stop watching and return the peak in bytes."""
        if self._cuda:
            return int(torch.cuda.max_memory_allocated())
        self._done.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self._peak = max(self._peak, process.memory_info().rss)
            if self._done.wait(0.05):
                return
